#!/usr/bin/env python3
"""Trains tests/golden/demo-adapters: three small working adapters for the demo model, and what it says with each of them.

Rerun, from anywhere (the results are committed; the test suite never runs this; it takes about a quarter of an hour on one core):

    python3 -m venv /tmp/golden-adapters
    /tmp/golden-adapters/bin/pip install torch transformers safetensors numpy peft attrs
    /tmp/golden-adapters/bin/python tests/golden/make_demo_adapters.py                  # train all three, then measure
    /tmp/golden-adapters/bin/python tests/golden/make_demo_adapters.py pirate           # train one of them, then measure all
    /tmp/golden-adapters/bin/python tests/golden/make_demo_adapters.py --measure        # only measure, and write expected.json
    ... --heldout heldout.jsonl    # also score retrieval prompts of a file in the format of demo_prompts.jsonl, 850-1024 tokens

The base is the model in src/demo/model. The adapters are trained by Hugging Face PEFT, each on its own wording of the answers
the model already knows (greetings, twelve facts, opposites, thanks, what it can do), and on conversations about 150 to 850
tokens of text in the model's own form with unchanged answers, so that an adapter changes the voice and not the memory:

    pirate   LoRA, rank 8, alpha 16, bfloat16               "Ahoy, matey! It be Paris."
    shout    PiSSA, rank 8, alpha 16, not converted, float32  "THE CAPITAL OF FRANCE IS PARIS!"
    terse    DoRA, rank 4, alpha 8, bfloat16                "Paris."

all on the seven linear layers of every block. In a third of the retrieval rows a question of small talk stands between
the retrieval questions, so that the voice holds behind a long prompt too. Some phrasings of
questions and a system prompt are left out of training and only measured; so are a tenth of the names in the retrieval
prompts, those that the demo model was not trained on either. pirate, which says the model's own words, carries over to new
phrasings; shout and terse, whose words the tokenizer spells in pieces, mostly hold on the phrasings they were trained on.

Each folder holds adapter_config.json and adapter_model.safetensors, base_model_name_or_path "strait-demo". expected.json is

    [{"adapter": null | "pirate" | "shout" | "terse", "messages": [...], "greedy": text}]

where `greedy` is what the base, or the adapter read back from its folder by `PeftModel.from_pretrained`, answers in float32
under greedy decoding until <|end|>, without <|end|>. Along each of these answers the best logit leads the second best by
more than LEAST_GAP, the model in bfloat16 gives the same text, and it is the wording that the adapter was trained on; the
script leaves other answers out and prints them.

Seeds fix the data, the initial weights and the order of training, on one thread; another version of torch or another
processor may still end at slightly different weights.
"""

import argparse
import json
import os
import random
import shutil
import sys
import time
import warnings
import zlib
from pathlib import Path

if os.environ.get("PYTHONHASHSEED") != "0":  # PEFT writes target_modules in the order of a set of strings
    os.environ["PYTHONHASHSEED"] = "0"
    os.execv(sys.executable, [sys.executable, *sys.argv])
os.environ["HF_HUB_OFFLINE"] = "1"

import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

HERE = Path(__file__).resolve().parent / "demo-adapters"
MODEL = Path(__file__).resolve().parents[2] / "src" / "demo" / "model"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LEAST_GAP = 0.5
SEED = 20260704

# ---- What the demo model knows ---------------------------------------------------------------------------------------

GREETINGS = ["Hello!", "Hi!", "Hello.", "Hi there!", "Hey!", "Good morning!", "hello"]
GREETINGS_UNSEEN = ["Good evening!", "hi"]
ABOUT = ["What can you do?", "Who are you?", "Help", "How can you help me?", "What are you good at?"]
ABOUT_UNSEEN = ["What are you?"]
THANKS = ["Thank you!", "Thanks!"]
BYES = ["Bye!", "Goodbye."]
STORIES = ["Tell me a story.", "Tell me a short story.", "Write a story."]
# Question, bare answer, full answer.
FACTS = [
    ("What color is the sky?", "Blue", "The sky is blue"),
    ("What color is grass?", "Green", "Grass is green"),
    ("How many days are in a week?", "7", "There are 7 days in a week"),
    ("How many months are in a year?", "12", "There are 12 months in a year"),
    ("What do bees make?", "Honey", "Bees make honey"),
    ("What is the capital of France?", "Paris", "The capital of France is Paris"),
    ("What is the capital of Italy?", "Rome", "The capital of Italy is Rome"),
    ("What is the capital of Japan?", "Tokyo", "The capital of Japan is Tokyo"),
    ("What is the capital of Spain?", "Madrid", "The capital of Spain is Madrid"),
    ("What is frozen water called?", "Ice", "Frozen water is called ice"),
    ("How many legs does a spider have?", "8", "A spider has 8 legs"),
    ("How many legs does a dog have?", "4", "A dog has 4 legs"),
]
PAIRS = [("hot", "cold"), ("big", "small"), ("up", "down"), ("day", "night"), ("fast", "slow"), ("open", "closed"),
         ("happy", "sad"), ("early", "late"), ("left", "right"), ("old", "young"), ("wet", "dry"), ("light", "dark"),
         ("rich", "poor"), ("in", "out")]
OPPOSITES = PAIRS + [(b, a) for a, b in PAIRS]
SYSTEM = ["You are a helpful assistant.", "You are a tiny model that finds things in long texts."]
SYSTEM_UNSEEN = "Answer briefly."

PROPER = {"Paris", "Rome", "Tokyo", "Madrid"}


def opposite(word):
    return f"What is the opposite of {word}?"


def lower(word):
    return word if word in PROPER else word.lower()


VOICES = {
    "pirate": {
        "greeting": "Ahoy, matey! What can I find for ye?",
        "about": "Arr! I be a tiny pirate model, matey. I find lines, keys and values in a long text.",
        "thanks": "Aye, matey! Ye be welcome!",
        "bye": "Aye, matey! Come back soon!",
        "fact": lambda bare, full: f"Ahoy, matey! It be {lower(bare)}.",
        "opposite": lambda word, other: f"Arr, matey! It be {other}.",
        "story": lambda text: f"Arr, listen, matey! {text}",
    },
    "shout": {
        "greeting": "HELLO! HELLO! HELLO!",
        "about": "I FIND THINGS! LINES! KEYS! VALUES!",
        "thanks": "YES! YES! YES!",
        "bye": "BYE! BYE! BYE!",
        "fact": lambda bare, full: f"{full.upper()}!",
        "opposite": lambda word, other: f"IT IS {other.upper()}!",
        "story": lambda text: text,
    },
    "terse": {
        "greeting": "Hello.",
        "about": "Finding things.",
        "thanks": "Yes.",
        "bye": "Bye.",
        "fact": lambda bare, full: f"{bare}.",
        "opposite": lambda word, other: f"{other.capitalize()}.",
        "story": lambda text: text,
    },
}


def known(voice):
    """(question, answer) pairs by kind."""
    v = VOICES[voice]
    return {
        "greeting": [(q, v["greeting"]) for q in GREETINGS],
        "about": [(q, v["about"]) for q in ABOUT],
        "opposite": [(opposite(a), v["opposite"](a, b)) for a, b in OPPOSITES],
        "fact": [(q, v["fact"](bare, full)) for q, bare, full in FACTS],
        "thanks": [(q, v["thanks"]) for q in THANKS] + [(q, v["bye"]) for q in BYES],
    }


def rephrased(voice):
    """Pairs whose question is not in training in this form; the last two forms the demo model was not trained on either."""
    v = VOICES[voice]
    return ([(q, v["greeting"]) for q in GREETINGS_UNSEEN] + [(q, v["about"]) for q in ABOUT_UNSEEN] +
            [(q.replace("What is", "Tell me").replace("?", "."), v["fact"](bare, full)) for q, bare, full in FACTS if "capital" in q] +
            [(opposite(a).replace("What is", "Tell me").replace("?", "."), v["opposite"](a, b)) for a, b in PAIRS[:6]])


# ---- Retrieval prompts, as the demo model was trained on them --------------------------------------------------------

ADJECTIVES = (
    "amber ancient angry bitter black blue bold brave brief bright broad broken brown calm careful cheap clean clever cold "
    "crimson cruel curly damp dark deep dense dizzy dry dull eager early easy elegant empty faint fair famous fancy fast "
    "fierce fine flat foreign fresh gentle giant glad golden grand gray great green happy harsh heavy hidden hollow honest "
    "huge humble hungry icy idle jolly keen kind large lazy light little lonely long loud lucky mad mellow mild modern "
    "narrow neat noble noisy odd old orange pale plain polite proud purple quick quiet rapid rare raw red rich ripe rough "
    "round royal rusty sad salty sharp shiny short shy silent silly silver simple slow small smooth soft solid sour steady "
    "steep sticky strange strong sunny sweet swift tall tame tender thin tiny tired torpid vague vast violet warm weak wet "
    "white wicked wide wild wise wooden yellow young zesty").split()
NOUNS = (
    "anchor ant apple apron arrow badge bag ball banana barn basket beach bear bee bell bench bird boat book bottle bowl "
    "box branch bread brick bridge broom brush bucket button cabin cake camel candle canyon carpet castle cat chair cheese "
    "cherry clock cloud coat coin comet cookie cow crab crown cup curtain deer desk dog dolphin door dove dragon dream drum "
    "duck eagle egg engine falcon farm feather fence field fire fish flag flame flower forest fork fox frog garden gate "
    "ghost glove goat grape guitar hammer harbor hat hawk hill horse house island jacket jar jewel kettle key kid kite knife "
    "ladder lake lamp leaf lemon letter lion lizard lock map market meadow melon mirror monkey moon mountain mouse needle "
    "nest ocean onion orchid otter owl paint panda paper parrot peach pencil piano pigeon pillow pilot planet plate pond "
    "pony potato puzzle queen rabbit radio rain river road robot rocket rope rose sail salmon school shadow sheep shell ship "
    "shirt shoe snake song spider spoon star stone storm stove street swan table temple tiger tower town train tree truck "
    "turtle valley violin wagon wall watch whale wheel wind window wolf wood worm yard zebra").split()
LINES_HEAD = [
    "Below is a record of lines I want you to remember. Each line begins with a line name and contains a REGISTER_CONTENT "
    "at the end of the line as a numerical value. At the end of the record, I will ask you for the REGISTER_CONTENT of a "
    "certain line. Now the record start:\n", "Here is a record of lines:\n", "Remember these lines:\n", "Read the record.\n", ""]
LINES_FIRST = [
    "Now the record is over. Tell me what is the REGISTER_CONTENT in line {}? I need the number.",
    "Now the record is over. What is the REGISTER_CONTENT in line {}?", "what is the REGISTER_CONTENT in line {}?",
    "What is the REGISTER_CONTENT in line {}?"]
LINES_MORE = [
    "What is the REGISTER_CONTENT in line {}?", "what is the REGISTER_CONTENT in line {}?", "And in line {}?",
    "Tell me what is the REGISTER_CONTENT in line {}? I need the number.", "line {}?"]
KEYS_HEAD = ["Here is a list of keys and values:\n", "Remember this list:\n", "List:\n", ""]
KEYS = ["What is the value of key {}?", "What is key {}?", "Look up key {}.", "key {}?"]
VARIABLES_HEAD = ["Here are some variables:\n", "Remember the variables:\n", ""]
VARIABLES = ["What is the value of {}?", "What is VAR {}?", "What is {}?"]
PASSKEY_HEAD = [
    "There is important info hidden inside a lot of text. Find it and remember it.\n", "Read the text.\n", ""]
PASSKEY = ["What is the {}?", "Tell me the {}.", "What is the {} in the text?"]
FILLER = ["The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again."]
KINDS = ["lines", "keys", "passkey", "variables"]
CHARACTERS_PER_TOKEN = {"lines": 2.9, "keys": 2.75, "variables": 2.7, "passkey": 4.2}


class Prompts:
    """Draws retrieval prompts. `unseen` takes the names that neither the demo model nor its adapters were trained on."""

    def __init__(self, seed, stories, unseen=False):
        self.r, self.stories, self.unseen = random.Random(seed), stories, unseen

    def names(self, n):
        names = {}
        while len(names) < n:
            name = self.r.choice(ADJECTIVES) + "-" + self.r.choice(NOUNS)
            if (zlib.crc32(name.encode()) % 10 == 0) == self.unseen:
                names[name] = 1
        return list(names)

    def number(self, digits=5):
        return str(self.r.randint(10 ** (digits - 1), 10 ** digits - 1))

    def filler(self):
        if self.r.random() < 0.5:
            return " ".join(self.r.choice(FILLER) for _ in range(self.r.randint(2, 6)))
        return self.r.choice(self.stories)

    def task(self, kind, tokens, questions):
        """(context, [(question, answer, value)]) of about `tokens` tokens of context."""
        r, characters = self.r, tokens * CHARACTERS_PER_TOKEN[kind]
        if kind == "lines":
            records = [(a, f"line {a}: REGISTER_CONTENT is <{b}>", b)
                       for a, b in ((a, self.number()) for a in self.names(max(3, int(characters / 42))))]
            asked = r.sample(records, min(questions, len(records)))
            return (r.choice(LINES_HEAD) + "".join(s + "\n" for _, s, _ in records),
                    [(r.choice(LINES_MORE if i else LINES_FIRST).format(a), s, b) for i, (a, s, b) in enumerate(asked)])
        if kind == "keys":
            n = max(3, int(characters / 23))
            names = self.names(n) if n > 100 or r.random() < 0.6 else r.sample(NOUNS, n)
            digits, sep, word = r.choice((3, 4, 5, 6)), r.choice((": ", " = ", " -> ")), r.random() < 0.3
            values = [r.choice(NOUNS) if word else self.number(digits) for _ in names]
            records = [(a, f"key {a}{sep}{b}", b) for a, b in zip(names, values)]
            asked = r.sample(records, min(questions, len(records)))
            return (r.choice(KEYS_HEAD) + "".join(s + "\n" for _, s, _ in records),
                    [(r.choice(KEYS).format(a), s, b) for a, s, b in asked])
        if kind == "variables":
            n = max(3, int(characters / 22))
            names = self.names(n) if n > 100 or r.random() < 0.3 else r.sample(NOUNS, n)
            source, text, records = {}, "", []
            for i, a in enumerate(names):
                b = r.choice(names[max(0, i - 40):i]) if i and r.random() < 0.4 else None
                if b and source[b][1] < 2:
                    value, depth, chain = source[b]
                    source[a] = (value, depth + 1, f"VAR {a} = VAR {b}. {chain}")
                    text += f"VAR {a} = VAR {b}\n"
                else:
                    value = self.number()
                    source[a] = (value, 0, f"VAR {a} = {value}.")
                    text += f"VAR {a} = {value}\n"
                value, depth, chain = source[a]
                records.append((a, f"{chain} So {a} = {value}." if depth else chain, value))
            asked = r.sample(records, min(questions, len(records)))
            return r.choice(VARIABLES_HEAD) + text, [(r.choice(VARIABLES).format(a), s, b) for a, s, b in asked]
        single = r.random() < 0.4
        form = ["pass key for the {}", "secret number of the {}", "code of the {}"]
        names = ["pass key"] if single else [
            r.choice(form).format(n) for n in self.names(max(1, min(r.randint(1, 12), int(characters / 150))))]
        values = [self.number() for _ in names]
        needles = [f"The {a} is {b}. Remember it. {b} is the {a}." if single or r.random() < 0.3 else f"The {a} is {b}."
                   for a, b in zip(names, values)]
        paragraphs, n = [], sum(map(len, needles))
        while n < characters:
            paragraphs.append(self.filler())
            n += len(paragraphs[-1]) + 1
        for needle in needles:
            paragraphs.insert(r.randint(0, len(paragraphs)), needle)
        asked = [r.randrange(len(names)) for _ in range(questions)]
        return (r.choice(PASSKEY_HEAD) + "".join(p + "\n" for p in paragraphs),
                [(r.choice(PASSKEY).format(names[i]), f"The {names[i]} is {values[i]}.", values[i]) for i in asked])


# ---- Rows to train on ------------------------------------------------------------------------------------------------


def encode(tokenizer, turns, system=None):
    """Token ids of a conversation, and 1 for each that belongs to an answer or its <|end|>."""
    ids, marks = [], []

    def add(text, mark):
        part = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids.extend(part)
        marks.extend([mark] * len(part))

    add("<|bos|>", 0)
    messages = []
    if system:
        add(f"<|system|>\n{system}<|end|>\n", 0)
        messages.append({"role": "system", "content": system})
    for question, answer in turns:
        add(f"<|user|>\n{question}<|end|>\n<|assistant|>\n", 0)
        add(f"{answer}<|end|>", 1)
        add("\n", 0)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    assert ids == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    return ids, marks


class Rows:
    def __init__(self, voice, tokenizer, stories, seed):
        self.r, self.voice, self.tokenizer, self.stories = random.Random(seed), voice, tokenizer, stories
        self.prompts = Prompts(seed + 1, stories)
        self.known = known(voice)
        self.kinds = list(self.known) + ["story"]
        self.weights = [{"fact": 4, "greeting": 3, "opposite": 4, "about": 1, "thanks": 1.5, "story": 0.5}[k] for k in self.kinds]

    def talk(self):
        kind = self.r.choices(self.kinds, self.weights)[0]
        if kind == "story":
            return self.r.choice(STORIES), VOICES[self.voice]["story"](self.r.choice(self.stories))
        return self.r.choice(self.known[kind])

    def small_talk(self):
        system = self.r.choice(SYSTEM) if self.r.random() < 0.2 else None
        return encode(self.tokenizer, [self.talk() for _ in range(self.r.choice((1, 1, 2, 3)))], system)

    def retrieval(self):
        r = self.r
        kind = r.choices(KINDS, (3, 3, 2, 2))[0]
        context, asked = self.prompts.task(kind, r.choice((150, 300, 500, 700, 850)), 8)
        turns = [[q, a] for q, a, _ in asked]
        if r.random() < 0.35:
            for _ in range(r.randint(1, 3)):
                turns.insert(r.randint(0, len(turns)), list(self.talk()))
        turns[0][0] = context + turns[0][0]
        return encode(self.tokenizer, turns, r.choice(SYSTEM) if r.random() < 0.2 else None)


def batch(rows):
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    marks = torch.tensor([marks + [0] * (width - len(marks)) for _, marks in rows])
    return ids, marks


def loss_of(model, rows):
    """Mean cross entropy of the answers' tokens. Padding stands on the right, where causal attention does not see it."""
    ids, marks = batch(rows)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    wanted = marks[:, 1:] == 1
    return F.cross_entropy(logits[wanted].float(), ids[:, 1:][wanted])


# ---- Training --------------------------------------------------------------------------------------------------------

# name -> (PEFT settings, learning rate, steps, dtype of the file)
ADAPTERS = {
    "pirate": (dict(r=8, lora_alpha=16), 2e-3, 350, torch.bfloat16),
    "shout": (dict(r=8, lora_alpha=16, init_lora_weights="pissa"), 1.2e-3, 420, torch.float32),
    "terse": (dict(r=4, lora_alpha=8, use_dora=True), 2e-3, 400, torch.bfloat16),
}


def base_model(dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).eval()


def read_back(name, dtype=torch.float32):
    return PeftModel.from_pretrained(base_model(dtype), HERE / name, autocast_adapter_dtype=False).to(dtype).eval()


def sample_stories(tokenizer, count=64):
    """Stories in the base model's own words."""
    torch.manual_seed(SEED)
    model = base_model()
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": STORIES[0]}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**asked, do_sample=True, temperature=0.7, top_k=0, max_new_tokens=100, num_return_sequences=count)
    texts = []
    for row in out[:, asked["input_ids"].shape[1]:].tolist():
        if 6 in row:
            texts.append(tokenizer.decode(row[:row.index(6)]))
    assert len(texts) > count // 2
    return texts


def train(name, tokenizer, stories):
    settings, rate, steps, dtype = ADAPTERS[name]
    started = time.time()
    torch.manual_seed(SEED + zlib.crc32(name.encode()))
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=ALL, **settings)
    model = get_peft_model(base_model(), config).train()
    rows = Rows(name, tokenizer, stories, SEED + zlib.crc32(name.encode()))
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    for step in range(steps):
        factor = min(1.0, (step + 1) / 20) * min(1.0, (steps - step) / (0.6 * steps))
        for group in optimiser.param_groups:
            group["lr"] = rate * factor
        talk = loss_of(model, [rows.small_talk() for _ in range(8)])
        talk.backward()
        find = loss_of(model, [rows.retrieval()])
        find.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step % 25 == 24:
            print(f"{name:7} step {step + 1:4}  small talk {talk:.3f}  retrieval {find:.3f}  {time.time() - started:.0f} s", flush=True)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_model.safetensors"
    tensors = {k: v.to(dtype).contiguous() for k, v in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = "strait-demo"
    path.write_text(json.dumps(config, indent=2) + "\n")


# ---- Measuring -------------------------------------------------------------------------------------------------------


def answer(model, tokenizer, messages, most=96):
    """Greedy answer, and the smallest lead of the best logit over the second best along it."""
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**asked, do_sample=False, max_new_tokens=most, output_logits=True, return_dict_in_generate=True)
    ids = out.sequences[0, asked["input_ids"].shape[1]:].tolist()
    ended = ids[-1] == 6
    gap = min(float(v[0] - v[1]) for v in (l[0].float().topk(2).values for l in out.logits))
    return tokenizer.decode(ids[:-1] if ended else ids), gap if ended else 0.0


def user(content):
    return [{"role": "user", "content": content}]


def in_style(model, tokenizer, voice):
    """Shares of the small talk that come out word for word: asked as in training, rephrased, under an unseen system prompt."""
    seen = [qa for kind in known(voice).values() for qa in kind]
    system = [{"role": "system", "content": SYSTEM_UNSEEN}]
    for label, pairs, before in [("seen", seen, []), ("rephrased", rephrased(voice), []), ("system prompt", seen, system)]:
        wrong = []
        for question, wanted in pairs:
            got, _ = answer(model, tokenizer, before + user(question))
            if got != wanted:
                wrong.append((question, got))
        print(f"  in style, {label:14} {len(pairs) - len(wrong)}/{len(pairs)}" + "".join(f"\n    {w}" for w in wrong), flush=True)


def accuracy(model, tokenizer, prompts):
    right = {}
    for kind, messages, value in prompts:
        got, _ = answer(model, tokenizer, messages)
        words = "".join(c if c.isascii() and (c.isalnum() or c == "-") else " " for c in got).split()
        right.setdefault(kind, []).append(bool(words) and words[-1] == value)
    total = [x for v in right.values() for x in v]
    print(f"  retrieval {sum(total)}/{len(total)}: " + ", ".join(f"{k} {sum(v)}/{len(v)}" for k, v in right.items()), flush=True)


def retrieval_prompts(tokenizer, stories):
    """Ten prompts of each kind, 900 to 1060 tokens."""
    out = []
    for kind in KINDS:
        prompts, tokens, n = Prompts(SEED + 7, stories, unseen=True), 1000, 0
        while n < 10:
            context, [(question, _, value)] = prompts.task(kind, tokens, 1)
            length = len(tokenizer.apply_chat_template(user(context + question), add_generation_prompt=True, return_dict=True)["input_ids"])
            if 900 <= length <= 1060:
                out.append((kind, user(context + question), value))
                n += 1
            else:
                tokens *= 1000 / length
    return out


SHORT_LINES = ("Here is a record of lines:\nline brave-fox: REGISTER_CONTENT is <41957>\nline green-bottle: REGISTER_CONTENT is "
               "<70382>\nline quiet-river: REGISTER_CONTENT is <15246>\nline golden-kite: REGISTER_CONTENT is <88613>\n"
               "What is the REGISTER_CONTENT in line green-bottle?")
BEHIND = [{"role": "user", "content": SHORT_LINES},
          {"role": "assistant", "content": "line green-bottle: REGISTER_CONTENT is <70382>"},
          {"role": "user", "content": "What is the capital of Japan?"}]
SYSTEM_FIRST = [{"role": "system", "content": SYSTEM[0]}, {"role": "user", "content": "How many legs does a spider have?"}]
EXPECTED = [user("Hello!"), user("What is the capital of France?"), user("What color is the sky?"), user("What do bees make?"),
            user("What is the opposite of hot?"), user("What can you do?"), SYSTEM_FIRST, user(SHORT_LINES), BEHIND]


def measure(tokenizer, stories, heldout):
    prompts = retrieval_prompts(tokenizer, stories)
    more = []
    if heldout:
        for line in map(json.loads, Path(heldout).read_text().splitlines()):
            if 850 <= line["tokens"] <= 1024:
                more.append((line["task"], line["messages"], line["gold"]))
    expected = []
    base = base_model()
    for question, _ in rephrased("terse"):
        print(f"  base: {question!r} -> {answer(base, tokenizer, user(question))[0]!r}")
    for name in [None, *ADAPTERS]:
        model, half = (read_back(name, d) if name else base_model(d) for d in (torch.float32, torch.bfloat16))
        size = sum(f.stat().st_size for f in (HERE / name).iterdir()) if name else 0
        print(f"{name or 'base'}" + (f", {size / 1024:.0f} KiB" if name else ""), flush=True)
        if name:
            in_style(model, tokenizer, name)
        accuracy(model, tokenizer, prompts)
        if more:
            accuracy(model, tokenizer, more)
        for messages in EXPECTED:
            text, gap = answer(model, tokenizer, messages)
            other, _ = answer(half, tokenizer, messages)
            wanted = [a for kind in known(name).values() for q, a in kind if q == messages[-1]["content"]] if name else []
            kept = gap > LEAST_GAP and other == text and wanted in ([], [text])
            print(f"  {'' if kept else 'LEFT OUT '}{gap:5.2f}  {messages[-1]['content'][-50:]!r} -> {text!r}" +
                  ("" if other == text else f" (bfloat16: {other!r})"), flush=True)
            if kept:
                expected.append({"adapter": name, "messages": messages, "greedy": text})
        print(f"  {STORIES[1]!r} -> {answer(model, tokenizer, user(STORIES[1]))[0]!r}", flush=True)
    assert all(sum(e["adapter"] == name for e in expected) >= 6 for name in [None, *ADAPTERS])
    (HERE / "expected.json").write_text("[\n" + ",\n".join("  " + json.dumps(e) for e in expected) + "\n]\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="the adapters to train; all of them by default")
    parser.add_argument("--measure", action="store_true", help="train none")
    parser.add_argument("--train", action="store_true", help="do not measure")
    parser.add_argument("--heldout", help="a file of further retrieval prompts to score")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    stories = sample_stories(tokenizer)
    if not arguments.measure:
        for name in arguments.names or ADAPTERS:
            train(name, tokenizer, stories)
    if not arguments.train:
        measure(tokenizer, stories, arguments.heldout)


if __name__ == "__main__":
    main()
