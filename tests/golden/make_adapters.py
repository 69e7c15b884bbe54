#!/usr/bin/env python3
"""Makes tests/golden/adapters: small random adapters of every LoRA kind, and the logits Hugging Face PEFT gives with them.

Rerun, from anywhere (the results are committed; the test suite never runs this):

    python3 -m venv /tmp/golden-adapters
    /tmp/golden-adapters/bin/pip install torch transformers safetensors numpy peft attrs
    /tmp/golden-adapters/bin/python tests/golden/make_adapters.py                  # all cases
    /tmp/golden-adapters/bin/python tests/golden/make_adapters.py lora-all dora    # some of them

The base models are those of tests/golden/models, their weights widened to float32. Adapter weights come from numpy's
PCG64, seeded by case and tensor name; what an initialisation of PEFT computes (PiSSA, OLoRA, CorDA, LoRA-GA, EVA) is
kept and then moved a little, as training would. The size of the draw is halved or doubled until the largest change of a
logit lies between 0.4 and 4. Each adapter is saved by `PeftModel.save_pretrained`, its base_model_name_or_path is
replaced by the base model's folder name, and it is read back by `PeftModel.from_pretrained` on a freshly loaded base;
that model's own forward pass, in float32 on one thread with eager attention, gives the numbers. `merge_and_unload` must
give the same logits within 2e-4, but for the cases listed in UNMERGEABLE, with the reasons there.

Each folder holds adapter_config.json, adapter_model.safetensors and expected.json:

    {"base": "llama3",                       a folder of tests/golden/models
     "made_with": {...},
     "largest_change": float,                largest |logit - logit of the base alone| over the three prompts
     "cases": [{
        "prompt": [ids],                     lengths 5, 70, 130
        "logits": [vocab floats],            at the last position
        "logprobs": [n-1 floats]}]}          ln p(prompt[i+1] | prompt[..=i]), natural logarithm

with seven significant digits. Some have "note", a sentence on what the case shows. A folder with "refused" (a reason) in
place of "cases" is one a server should decline. "residual": "base" means that the adapter belongs on the full float32
checkpoint in the sub-folder `base`, and that `base` (the field) names the model this checkpoint was made from.

The sorsa-* folders follow https://github.com/Gunale0926/SORSA and are computed here without its code: singular value
decompositions and merged weights in float64 numpy, the merged weights then run through transformers. sorsa-full is a
whole model as SORSA saves one (config.json with model_type "sorsa", here with the base model's fields beside SORSA's;
model.safetensors with every key prefixed by `model.`). sorsa-compact and sorsa-compact-alpha hold only the sorsa_A,
sorsa_S and sorsa_B tensors, for a server that rebuilds the residual from the base model's own singular vectors;
sorsa-compact-alpha's config.json holds SORSA's fields alone, which is all that its own code writes. The residual weights
of sorsa-full are bfloat16 among float32 tensors, as SORSA's training script leaves them; "unrounded" has the cases once more from residual
weights in float32. The script asserts that the
full form, before that rounding, and the compact form of the same adapter agree.

index.json lists every case: {"name", "base", "kind"}; CASES, below, has the kinds. A CorDA or LoRA-GA adapter that was
not converted has no case: PEFT cannot load the first on its base, and loads the second onto the wrong one.
"""

import json
import os
import shutil
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

if os.environ.get("PYTHONHASHSEED") != "0":  # PEFT writes target_modules in the order of a set of strings
    os.environ["PYTHONHASHSEED"] = "0"
    os.execv(sys.executable, [sys.executable, *sys.argv])
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import peft
import safetensors.torch
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

MODELS = Path(__file__).resolve().parent / "models"
HERE = Path(__file__).resolve().parent / "adapters"
PROMPT_LENGTHS = [5, 70, 130]
LEAST, MOST = 0.4, 4.0  # of the largest change of a logit
MERGED = 2e-4
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
ALL = ATTENTION + MLP

# Cases whose numbers must equal those of another, within the noise of float32.
SAME_PROMPTS = {"fan-in-fan-out": "lora-all", "all-linear-string": "all-linear", "pissa": "pissa-converted",
                "pissa-residual": "pissa-converted", "pissa-rslora": "pissa-rslora-converted",
                "pissa-patterns": "pissa-patterns-converted", "olora": "olora-converted"}

# Why merge_and_unload does not, or cannot, give the adapter's own forward pass.
UNMERGEABLE = {
    "lora-bias": "PEFT refuses to merge a LoRA bias into a projection that has none (o_proj and down_proj here).",
    "embed-lora": "The head is tied to the embedding: PEFT's forward pass changes the embedding only, its merge both.",
    "embed-lora-lean": "As embed-lora.",
    "embed-lora-ensure-tied": "PEFT adds both products to the one tied weight.",
    "head-lora-tied": "The head is tied to the embedding: PEFT's forward pass changes the head only, its merge both.",
}


def rng_for(*labels):
    return np.random.Generator(np.random.PCG64(zlib.crc32("/".join(map(str, labels)).encode())))


def normal(shape, scale, *labels):
    return torch.from_numpy(np.ascontiguousarray(rng_for(*labels).normal(0.0, scale, tuple(shape)), dtype=np.float32))


def uniform(shape, low, high, *labels):
    return torch.from_numpy(np.ascontiguousarray(rng_for(*labels).uniform(low, high, tuple(shape)), dtype=np.float32))


def load(base):
    folder = base if isinstance(base, Path) else MODELS / base
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def prompts(name, vocab):
    name = SAME_PROMPTS.get(name, name)
    return [[int(t) for t in rng_for("prompt", name, n).integers(0, vocab, n)] for n in PROMPT_LENGTHS]


def digits(values):
    return [float(f"{float(v):.7g}") for v in values]


# ---- Drawing the weights of an adapter -------------------------------------------------------------------------------


def plain(name, key, value, gain):
    """The default: everything random. `key` is the parameter's name in the PEFT model; None leaves a tensor alone."""
    if ".modules_to_save." in key:
        if value.ndim == 1:
            return value * uniform(value.shape, 1 - 0.4 * gain, 1 + 0.4 * gain, name, key)
        return value + normal(value.shape, 0.3 * gain * float(value.std()), name, key)
    if "lora_A." in key:
        return normal(value.shape, value.shape[1] ** -0.5, name, key)
    if "lora_B." in key:
        return normal(value.shape, (0.2 if key.endswith(".bias") else 0.3) * gain, name, key)
    if "lora_embedding_A." in key:
        return normal(value.shape, 0.3, name, key)
    if "lora_embedding_B." in key:
        return normal(value.shape, 0.3 * gain, name, key)
    if "lora_magnitude_vector." in key:
        return value * uniform(value.shape, 1 - 0.3 * min(gain, 2), 1 + 0.3 * min(gain, 2), name, key)
    return None


def moved(name, key, value, gain):
    """Keeps what the initialisation computed and adds noise of a tenth of its size."""
    if "lora_A." in key or "lora_B." in key:
        return value + normal(value.shape, 0.1 * gain * float(value.std()), name, key)
    return None


def moved_embed(name, key, value, gain):
    """As `moved`; an embedding's factors, whose product PEFT begins at zero whatever the initialisation, are drawn."""
    return plain(name, key, value, gain) if "lora_embedding" in key else moved(name, key, value, gain)


def second_factor(name, key, value, gain):
    """Keeps lora_A (of EVA) and draws lora_B, which starts at zero."""
    return plain(name, key, value, gain) if "lora_B." in key else None


def with_biases(targets):
    """As `plain`, and moves the base model's own biases: those of `targets`, or all of them."""
    def draw(name, key, value, gain):
        if key.endswith(".bias") and "lora_" not in key and any(t in key for t in targets):
            return value + normal(value.shape, 0.3 * gain, name, key)
        return plain(name, key, value, gain)
    return draw


def randomise(name, model, draw, gain, initial):
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            value = draw(name, key, initial[key].clone(), gain)
            parameter.copy_(initial[key] if value is None else value)


# ---- Writing, reading back, comparing --------------------------------------------------------------------------------


def tidy(folder, base, edit=None):
    """Keeps the two files of an adapter; names the base; makes further changes to the config."""
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base
    if edit:
        config = edit(config) or config
    path.write_text(json.dumps(config, indent=2) + "\n")
    files = {f.name for f in folder.iterdir()} - {"expected.json"}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}, (folder, files)


def reload(folder, base):
    torch.manual_seed(0)  # pissa_niter draws from it
    return PeftModel.from_pretrained(load(base), folder).eval()


def change(model, base, ids):
    return max(float((logits_of(model, p) - logits_of(base, p)).abs().max()) for p in ids)


def write_expected(folder, base, head, cases):
    body = {"base": base, "made_with": made_with(), **head}
    text = json.dumps(body)
    if cases is not None:
        lines = ",\n".join("  " + json.dumps(c) for c in cases)
        text = text[:-1] + ', "cases": [\n%s\n]}' % lines
    json.loads(text)
    (folder / "expected.json").write_text(text + "\n")


def made_with():
    return {"peft": peft.__version__, "transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}


def measure(model, ids):
    cases = []
    for prompt in ids:
        logits = logits_of(model, prompt)
        logp = torch.log_softmax(logits.double(), -1)
        cases.append({"prompt": prompt, "logits": digits(logits[-1]),
                      "logprobs": digits(logp[i, prompt[i + 1]] for i in range(len(prompt) - 1))})
    return cases


def record(name, base, note=None, residual=None, read_as=None):
    """Reads the folder back and writes what PEFT says of it. `read_as` replaces settings in a copy of the config first."""
    folder = HERE / name
    original = load(base)
    ids = prompts(name, original.config.vocab_size)
    on = folder / residual if residual else base
    with tempfile.TemporaryDirectory() as scratch:
        source = folder
        if read_as:
            source = Path(scratch) / "adapter"
            shutil.copytree(folder, source)
            tidy(source, base, setting(**read_as))
        cases = measure(reload(source, on), ids)
        largest = change(reload(source, on), original, ids)
        model = None if name in UNMERGEABLE else reload(source, on).merge_and_unload().eval()
    same = HERE / SAME_PROMPTS.get(name, name) / "expected.json"
    if name in SAME_PROMPTS:
        other = json.loads(same.read_text())["cases"]
        worst = max(abs(a - b) for c, d in zip(cases, other) for a, b in zip(c["logits"] + c["logprobs"],
                                                                             d["logits"] + d["logprobs"]))
        assert worst < MERGED, (name, SAME_PROMPTS[name], worst)
    merged = None
    if model:
        merged = max(float((logits_of(model, c["prompt"])[-1] - torch.tensor(c["logits"])).abs().max()) for c in cases)
        assert merged < MERGED, (name, merged)
    head = {"largest_change": float(f"{largest:.4g}")}
    if residual:
        head["residual"] = residual
    if note:
        head["note"] = note
    write_expected(folder, base, head, cases)
    keys = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"{name:24} {base:12} change {largest:6.3f}  merged {'-' if merged is None else f'{merged:.1e}':>8}  "
          f"{len(keys):3} tensors {size / 1024:6.0f} KiB", flush=True)
    return cases


def make(name, base, config, draw=plain, edit=None, dtype=None, note=None, initialise=None, save=None, prepare=None,
         read_as=None):
    """One case. `prepare(model, config)` runs before the adapter is attached, `initialise(model)` after."""
    folder = HERE / name
    ids = prompts(name, load(base).config.vocab_size)
    torch.manual_seed(zlib.crc32(name.encode()))
    model = load(base)
    if prepare:
        prepare(model, config)
    model = get_peft_model(model, config).eval()
    if initialise:
        initialise(model)
    initial = {k: p.detach().clone() for k, p in model.named_parameters()}
    original = load(base)
    gain = 1.0
    for _ in range(12):
        randomise(name, model, draw, gain, initial)
        size = change(model, original, ids)
        if LEAST <= size <= MOST:
            break
        gain *= 2.0 if size < LEAST else 0.5
    else:
        raise SystemExit(f"{name}: no gain gives a change between {LEAST} and {MOST}")
    own = [logits_of(model, p) for p in ids]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if save:
        save(model, folder)
    else:
        model.save_pretrained(folder)
    if dtype:
        path = folder / "adapter_model.safetensors"
        tensors = {k: v.to(dtype) for k, v in safetensors.torch.load_file(path).items()}
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    tidy(folder, base, edit)
    record(name, base, note, read_as=read_as)
    return model, own, ids


def same_as(name, source, base, edit, note=None):
    """The tensors of another case under a changed config."""
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in ["adapter_config.json", "adapter_model.safetensors"]:
        shutil.copy(HERE / source / file, folder / file)
    tidy(folder, base, edit)
    record(name, base, note)


def lora(**kw):
    kw.setdefault("r", 4)
    kw.setdefault("lora_alpha", 8)
    return LoraConfig(task_type="CAUSAL_LM", **kw)


def setting(**kw):
    def edit(config):
        config.update(kw)
    return edit


# ---- Plain LoRA ------------------------------------------------------------------------------------------------------


def lora_all():
    make("lora-all", "qwen2", lora(target_modules=ALL))


def lora_kv():
    make("lora-kv", "qwen3", lora(target_modules=["k_proj", "v_proj"], lora_alpha=6))


def lora_bf16():
    make("lora-bf16", "qwen2", lora(target_modules=ALL), dtype=torch.bfloat16,
         note="The tensors are stored as bfloat16 and widened exactly.")


def fan_in_fan_out():
    if not (HERE / "lora-all").exists():
        lora_all()
    same_as("fan-in-fan-out", "lora-all", "qwen2", setting(fan_in_fan_out=True),
            note="PEFT warns and treats fan_in_fan_out as false on every nn.Linear: the tensors of lora-all act as in lora-all.")


def rslora_patterns():
    make("rslora-patterns", "llama3", lora(
        target_modules=ALL, r=3, lora_alpha=6, use_rslora=True,
        rank_pattern={"down_proj": 2, "self_attn.o_proj": 5, r"layers\.[01]\.mlp\.up_proj": 6,
                      "^model.layers.0.self_attn.q_proj": 4, "up_proj": 2},
        alpha_pattern={"o_proj": 10, r"layers\.[12]\.mlp\.(gate|down)_proj": 3, "mlp.down_proj": 12,
                       "^model.layers.2.self_attn.k_proj": 9}),
        note="PEFT writes the keys of both patterns sorted; the first that matches, in file order, counts.")


def patterns_unsorted():
    def edit(config):
        config["rank_pattern"] = {"up_proj": 2, r"layers\.[01]\.mlp\.up_proj": 6, "q_proj": 3}
        config["alpha_pattern"] = {"self_attn.q_proj": 7, "layers.0.self_attn.q_proj": 20, "up_proj": 2,
                                   r".*layers\.1\.mlp\.up_proj": 30, "_proj": 1000, "proj": 1000, "layers.1.mlp": 1000}
    make("patterns-unsorted", "llama-linear", lora(
        target_modules=["q_proj", "v_proj", "up_proj"],
        rank_pattern={"up_proj": 2, "q_proj": 3}, alpha_pattern={"self_attn.q_proj": 7, "up_proj": 2}), edit=edit,
        note="The config's patterns are out of alphabetical order: the first in file order counts, later ones and keys that "
             "match only part of a name have no effect.")


def regex_targets():
    make("regex-targets", "llama3", lora(target_modules=r"model\.layers\.[02]\.(self_attn\.[qv]_proj|mlp\.down_proj)"))


def all_linear():
    make("all-linear", "llama-linear", lora(target_modules="all-linear", r=2))


def all_linear_string():
    if not (HERE / "all-linear").exists():
        all_linear()
    same_as("all-linear-string", "all-linear", "llama-linear", setting(target_modules="all-linear"))


def layers_to_transform():
    make("layers-to-transform", "llama3", lora(target_modules=["q_proj", "up_proj"], layers_to_transform=[1]))


def layers_pattern():
    make("layers-pattern", "llama3", lora(target_modules=["v_proj", "down_proj"], layers_to_transform=[0, 2],
                                          layers_pattern="layers"))


def exclude_modules():
    make("exclude-modules", "llama3", lora(target_modules=["q_proj", "v_proj", "o_proj"], r=2,
                                           exclude_modules=["model.layers.1.self_attn.q_proj", "layers.0.self_attn.o_proj"]))


# ---- Biases, whole modules -------------------------------------------------------------------------------------------


def lora_bias():
    make("lora-bias", "qwen2", lora(target_modules=["q_proj", "o_proj", "down_proj"], lora_bias=True, use_rslora=True),
         note="The bias of lora_B is scaled like the product: y = Wx + b + s (B A x + b_B).")


def lora_bias_merged():
    make("lora-bias-merged", "llama-bias", lora(target_modules=["q_proj", "o_proj", "down_proj"], lora_bias=True, r=3))


def bias_all():
    make("bias-all", "llama-bias", lora(target_modules=["q_proj", "up_proj"], bias="all"), draw=with_biases([""]))


def bias_lora_only():
    make("bias-lora-only", "llama-bias", lora(target_modules=["q_proj", "up_proj"], bias="lora_only"),
         draw=with_biases(["q_proj", "up_proj"]))


def modules_to_save():
    make("modules-to-save", "llama3", lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
         note="The base ties its head; PEFT saves and uses the head alone, the embedding stays the base model's.")


def modules_to_save_embed():
    make("modules-to-save-embed", "llama3", lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
         note="The base ties its head; PEFT saves and uses the embedding alone, the head stays the base model's.")


def modules_to_save_norms():
    make("modules-to-save-norms", "llama3", lora(
        target_modules=["v_proj"], modules_to_save=["norm", "input_layernorm", "post_attention_layernorm"]))


def modules_to_save_qk():
    make("modules-to-save-qk", "qwen3", lora(target_modules=["v_proj"], modules_to_save=["q_norm", "k_norm", "lm_head"]))


def modules_to_save_proj():
    make("modules-to-save-proj", "llama-linear", lora(target_modules=["q_proj"], modules_to_save=["o_proj"]))


def modules_to_save_proj_bias():
    make("modules-to-save-proj-bias", "llama-bias", lora(
        target_modules=["v_proj"], modules_to_save=["layers.1.self_attn.k_proj"]))


# ---- Embedding and head ----------------------------------------------------------------------------------------------


def lean(model, folder):
    model.save_pretrained(folder, save_embedding_layers=False)


def embed_lora():
    make("embed-lora", "llama3", lora(target_modules=["embed_tokens", "q_proj"]), note=UNMERGEABLE["embed-lora"])


def embed_lora_lean():
    make("embed-lora-lean", "llama3", lora(target_modules=["embed_tokens", "q_proj"], use_rslora=True),
         save=lean,
         note="As embed-lora, saved with save_embedding_layers=False: no copy of the base embedding in the file.")


def embed_lora_ensure_tied():
    make("embed-lora-ensure-tied", "llama3", lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
         save=lean, note="ensure_weight_tying: PEFT writes the embedding's factors again, transposed, as lora_A and lora_B of "
                         "lm_head, which target_modules does not name.")


def head_lora():
    make("head-lora", "qwen3", lora(target_modules=["lm_head", "v_proj"]))


def head_lora_tied():
    make("head-lora-tied", "qwen2", lora(target_modules=["lm_head", "v_proj"]), save=lean, note=UNMERGEABLE["head-lora-tied"])


def trainable_tokens():
    name, base = "trainable-tokens", "llama3"
    folder = HERE / name
    model = get_peft_model(load(base), lora(target_modules=["v_proj"], r=2, trainable_token_indices=[1, 2, 300])).eval()
    initial = {k: p.detach().clone() for k, p in model.named_parameters()}
    randomise(name, model, plain, 1.0, initial)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "trainable_tokens_delta" in key:
                parameter.add_(normal(parameter.shape, 0.2, name, key))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    tidy(folder, base)
    reload(folder, base)
    write_expected(folder, base, {"refused": "trainable_token_indices"}, None)
    print(f"{name:24} {base:12} refused", flush=True)


# ---- A vocabulary that was resized before training ----------------------------------------------------------------------


def from_vocabulary(tokens, folder):
    """A `prepare` for `make`: the base is made from a checkpoint of so many tokens, in `folder`, resized to the base's own."""
    def prepare(model, config):
        parts = [model.get_input_embeddings, model.get_output_embeddings]
        whole, rows = [part().weight.detach().clone() for part in parts], model.config.vocab_size
        model.resize_token_embeddings(tokens)
        model.save_pretrained(folder)
        model.resize_token_embeddings(rows)
        with torch.no_grad():
            for part, weight in zip(parts, whole):
                part().weight.copy_(weight)
        model.name_or_path = str(folder)
    return prepare


def resized(name, base, note, **config):
    with tempfile.TemporaryDirectory() as scratch:
        make(name, base, lora(**config), dtype=torch.bfloat16, prepare=from_vocabulary(250, Path(scratch)), note=note)


def resized_tied():
    resized("resized-tied", "llama3", "PEFT saves embedding and head, though neither was trained, because the vocabulary was "
            "resized from 250 tokens to the served model's 320 before training.", target_modules=["q_proj", "down_proj"])


def resized_saved():
    resized("resized-saved", "qwen3", "As resized-tied, of 384 tokens, with embedding and head in modules_to_save: the file has "
            "each three times: twice as trained, once as the base has it.",
            target_modules=["v_proj"], modules_to_save=["embed_tokens", "lm_head"])


def resized_grown():
    """The served base has the vocabulary from before resizing. PEFT refuses it (size mismatch), and so should a server."""
    name, base = "resized-grown", "qwen3"
    folder = HERE / name
    torch.manual_seed(0)  # new rows are drawn
    model = load(base)
    model.resize_token_embeddings(model.config.vocab_size + 4)
    model = get_peft_model(model, lora(target_modules=["v_proj"], r=2)).eval()
    initial = {k: p.detach().clone() for k, p in model.named_parameters()}
    randomise(name, model, plain, 1.0, initial)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.bfloat16().save_pretrained(folder)
    tidy(folder, base)
    try:
        reload(folder, base)
    except RuntimeError as error:
        assert "size mismatch" in str(error), error
    else:
        raise SystemExit(f"{name}: PEFT loads it")
    write_expected(folder, base, {"refused": "vocabulary"}, None)
    print(f"{name:24} {base:12} refused", flush=True)


# ---- DoRA ------------------------------------------------------------------------------------------------------------


def dora():
    make("dora", "llama-bias", lora(target_modules=ALL, use_dora=True, r=3))


def dora_rslora():
    make("dora-rslora", "qwen3", lora(target_modules=["k_proj", "v_proj", "down_proj"], use_dora=True, use_rslora=True, r=3,
                                      rank_pattern={"v_proj": 5}))


def dora_embed():
    make("dora-embed", "llama-linear", lora(target_modules=["embed_tokens", "lm_head", "k_proj"], use_dora=True), save=lean,
         note="The embedding's magnitude has one entry per hidden column, not one per token.")


# ---- EVA -------------------------------------------------------------------------------------------------------------


def eva():
    from peft import EvaConfig, initialize_lora_eva_weights
    data = [{"input_ids": torch.tensor([[int(t) for t in rng_for("eva", i, j).integers(0, 256, 32)] for j in range(4)])}
            for i in range(6)]
    make("eva", "llama-bias", lora(target_modules=ALL, r=4, lora_alpha=4, init_lora_weights="eva",
                                   eva_config=EvaConfig(rho=2.0, tau=0.99)), draw=second_factor,
         initialise=lambda model: initialize_lora_eva_weights(model, data, show_progress_bar=False),
         note="Ranks were redistributed: rank_pattern and alpha_pattern hold full paths, and layer 0's o_proj is gone.")


# ---- Initialisations that change the base ----------------------------------------------------------------------------


def agree(name, got, want, tolerance):
    worst = max(float((a - b).abs().max()) for a, b in zip(got, want))
    assert worst < tolerance, (name, worst)
    return worst


def three_ways(kind, init, base="llama-linear", unconverted=True, prepare=None, tolerance=MERGED, **config):
    """`kind` as PEFT saves it, and `kind`-converted with path_initial_model_for_weight_conversion."""
    with tempfile.TemporaryDirectory() as scratch:
        start = Path(scratch) / "initial"

        def initialise(model):
            peft_config = model.peft_config["default"]
            kept, peft_config.init_lora_weights = peft_config.init_lora_weights, True  # as PEFT's documentation says
            model.save_pretrained(start)
            peft_config.init_lora_weights = kept

        def save(model, folder):
            if unconverted:
                shutil.rmtree(HERE / kind, ignore_errors=True)
                (HERE / kind).mkdir(parents=True)
                model.save_pretrained(HERE / kind)
                tidy(HERE / kind, base)
            model.save_pretrained(folder, path_initial_model_for_weight_conversion=str(start))

        settings = lora(init_lora_weights=init, **config)
        _, own, ids = make(f"{kind}-converted", base, settings, draw=moved, initialise=initialise, save=save,
                           prepare=prepare)
    converted = reload(HERE / f"{kind}-converted", base)
    agree(f"{kind}-converted", [logits_of(converted, p) for p in ids], own, tolerance)
    if unconverted:
        record(kind, base, note="Stored unconverted: the adapter belongs on the base less its initial product, which PEFT "
                                "subtracts again when it loads this config.")
        plainly = reload(HERE / kind, base)
        worst = agree(kind, [logits_of(plainly, p) for p in ids], own, tolerance)
        print(f"{'':24} {kind}, {kind}-converted and the trained model agree, {kind} within {worst:.1e}", flush=True)


def pissa():
    three_ways("pissa", "pissa", target_modules=["q_proj", "o_proj", "gate_proj", "down_proj"])


def pissa_rslora():
    three_ways("pissa-rslora", "pissa", target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=True)


def pissa_patterns():
    three_ways("pissa-patterns", "pissa", target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 6},
               alpha_pattern={"layers.0.self_attn.q_proj": 3})


def pissa_niter():
    name, base = "pissa-niter", "llama-linear"
    make(name, base, lora(target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights="pissa"), draw=moved,
         edit=setting(init_lora_weights="pissa_niter_4"), read_as={"init_lora_weights": "pissa"},
         note="The expected numbers subtract the product of the exact top singular triplets. PEFT itself repeats a randomised "
              "decomposition when it loads pissa_niter_4, and on weights without a decaying spectrum, as here, no two of "
              "its loads agree; on pissa-niter-1000 they do.")
    models = []
    for seed in [1, 2]:
        model = load(base)
        torch.manual_seed(seed)
        models.append(PeftModel.from_pretrained(model, HERE / name).eval())
    ids = prompts(name, models[0].config.vocab_size)
    print(f"{'':24} two loads by PEFT differ by {change(*models, ids):.2f}", flush=True)


def pissa_niter_1000():
    name, base = "pissa-niter-1000", "llama-linear"
    _, own, ids = make(name, base, lora(target_modules=["q_proj", "v_proj", "down_proj"],
                                        init_lora_weights="pissa_niter_1000"), draw=moved,
                       note="So many power iterations that PEFT's randomised decomposition is the exact one.")
    with tempfile.TemporaryDirectory() as scratch:
        exact = Path(scratch) / "adapter"
        shutil.copytree(HERE / name, exact, ignore=shutil.ignore_patterns("expected.json"))
        tidy(exact, base, setting(init_lora_weights="pissa"))
        model = reload(exact, base)
    agree(name, [logits_of(model, p) for p in ids], own, MERGED)


def pissa_residual():
    """The PiSSA authors' recipe: the residual base is a checkpoint of its own, the adapter an ordinary LoRA on it."""
    name, base = "pissa-residual", "llama-linear"
    folder = HERE / name
    if not (HERE / "pissa").exists():
        pissa()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in ["adapter_config.json", "adapter_model.safetensors"]:
        shutil.copy(HERE / "pissa" / file, folder / file)
    residual = reload(HERE / "pissa", base).unload()
    residual.save_pretrained(folder / "base")
    (folder / "base" / "generation_config.json").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["init_lora_weights"] = True
    config["base_model_name_or_path"] = "pissa-residual/base"
    path.write_text(json.dumps(config, indent=2) + "\n")
    record(name, base, residual="base", note="Same model as pissa and pissa-converted, stored as a residual checkpoint.")


def olora():
    three_ways("olora", "olora", target_modules=["k_proj", "o_proj", "up_proj", "down_proj"])


def pissa_embed():
    make("pissa-embed", "llama-linear", lora(target_modules=["embed_tokens", "q_proj", "down_proj"], init_lora_weights="pissa"),
         draw=moved_embed, note="Nothing was taken out of the embedding: PEFT begins its factors at zero and saves the base's own beside them.")


def pissa_niter_embed():
    make("pissa-niter-embed", "llama-linear", lora(target_modules=["embed_tokens", "v_proj"], use_rslora=True,
                                                   init_lora_weights="pissa_niter_1000"), draw=moved_embed, save=lean,
         note="As pissa-embed, saved with save_embedding_layers=False.")


def olora_embed():
    make("olora-embed", "llama-linear", lora(target_modules=["embed_tokens", "k_proj", "o_proj"], init_lora_weights="olora"),
         draw=moved_embed, note="As pissa-embed.")


HEAD_KEPT = "PEFT saves beside the head's factors what the initialisation left of the head, and they belong on that."


def pissa_head():
    make("pissa-head", "llama-linear", lora(target_modules=["lm_head", "q_proj"], init_lora_weights="pissa"), draw=moved,
         note=HEAD_KEPT)


def pissa_head_lean():
    make("pissa-head-lean", "llama-linear", lora(target_modules=["lm_head", "q_proj"], init_lora_weights="pissa"), draw=moved,
         save=lean, note="As pissa-head, saved with save_embedding_layers=False: nothing beside the factors.")


def pissa_head_tied():
    """PEFT's initialisation takes its product out of the one tied tensor, so the embedding loses it, too, which nothing gives back."""
    name, base = "pissa-head-tied", "llama3"
    folder = HERE / name
    torch.manual_seed(0)
    original = load(base)
    model = get_peft_model(load(base), lora(target_modules=["lm_head", "q_proj"], r=2, init_lora_weights="pissa")).eval()
    begins = change(model, original, prompts(name, original.config.vocab_size))
    assert begins > 1, begins
    initial = {k: p.detach().clone() for k, p in model.named_parameters()}
    randomise(name, model, moved, 1.0, initial)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lean(model, folder)
    tidy(folder, base)
    write_expected(folder, base, {"refused": "the head is tied to the embedding"}, None)
    print(f"{name:24} {base:12} refused; its training begins {begins:.1f} from the base", flush=True)


def olora_head():
    make("olora-head", "llama-linear", lora(target_modules=["lm_head", "embed_tokens", "v_proj"], init_lora_weights="olora"),
         draw=moved_embed, note=HEAD_KEPT)


def corda():
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    def prepare(model, config):
        text = torch.tensor([[int(t) for t in rng_for("corda", j).integers(0, 256, 64)] for j in range(16)])

        def run():
            with torch.no_grad():
                for row in text:  # one sequence at a time: PEFT's hook takes no batch
                    model(input_ids=row[None], use_cache=False)
        preprocess_corda(model, config, run_model=run)

    three_ways("corda", "corda", target_modules=["q_proj", "v_proj", "down_proj"], unconverted=False, prepare=prepare,
               corda_config=CordaConfig(corda_method="kpm"))


def loraga():
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    def prepare(model, config):
        text = torch.tensor([[int(t) for t in rng_for("loraga", j).integers(0, 256, 64)] for j in range(8)])
        preprocess_loraga(model, config, lambda: model(input_ids=text, labels=text, use_cache=False).loss.backward())

    three_ways("lora-ga", "lora_ga", target_modules=["q_proj", "v_proj", "down_proj"], unconverted=False, prepare=prepare,
               lora_ga_config=LoraGAConfig())


# ---- SORSA -----------------------------------------------------------------------------------------------------------


def sorsa_parts(name, base, rank, alpha, targets, gain):
    """Residual weights, trained triples and merged weights of every targeted projection, in float64 then float32."""
    scale = 1.0 if alpha is None else alpha / rank
    parts, merged = {}, {}
    for key, weight in load(base).state_dict().items():
        module = key.removesuffix(".weight")
        if not (key.endswith(".weight") and any(t in module for t in targets) and weight.ndim == 2):
            continue
        w = weight.double().numpy()
        left, values, right = np.linalg.svd(w, full_matrices=False)
        b0, s0, a0 = left[:, :rank], values[:rank], right[:rank]
        noise = lambda which, shape, size: rng_for(name, key, which).normal(0.0, size, shape)
        a = (a0 + noise("A", a0.shape, 0.2 * gain * a0.std())).astype(np.float32)
        s = (s0 * (1 + noise("S", s0.shape, 0.1 * gain))).astype(np.float32)
        b = (b0 + noise("B", b0.shape, 0.2 * gain * b0.std())).astype(np.float32)
        residual = (w - scale * (b0 * s0) @ a0).astype(np.float32)
        stored = torch.from_numpy(residual).bfloat16()
        product = lambda b, s, a: scale * (b.astype(np.float64) * s.astype(np.float64)) @ a.astype(np.float64)
        parts[module] = {"weight": stored, "sorsa_A": a, "sorsa_S": s, "sorsa_B": b}
        merged[module] = {"stored": stored.double().numpy() + product(b, s, a),
                          "full": residual.astype(np.float64) + product(b, s, a),
                          "compact": w - product(b0, s0, a0) + product(b, s, a)}
    return parts, merged


def sorsa_model(base, merged, form):
    model = load(base)
    with torch.no_grad():
        for module, weights in merged.items():
            model.get_submodule(module).weight.copy_(torch.from_numpy(weights[form]))
    return model


def sorsa_case(name, base, rank, alpha, targets, form, whole_config=True):
    original = load(base)
    ids = prompts(name, original.config.vocab_size)
    gain = 1.0
    for _ in range(12):
        parts, merged = sorsa_parts(name, base, rank, alpha, targets, gain)
        model = sorsa_model(base, merged, "stored" if form == "full" else "compact")
        size = change(model, original, ids)
        if LEAST <= size <= MOST:
            break
        gain *= 2.0 if size < LEAST else 0.5
    full, compact = (sorsa_model(base, merged, f) for f in ["full", "compact"])
    worst = agree(name, [logits_of(full, p) for p in ids], [logits_of(compact, p) for p in ids], MERGED)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = json.loads((MODELS / base / "config.json").read_text())
    if not whole_config:  # what SORSA's own save_pretrained leaves
        config = {"architectures": ["SORSAModel"], "torch_dtype": "float32", "transformers_version": "4.44.2"}
    config.update({"model_type": "sorsa", "base_model_name_or_path": base, "rank": rank, "alpha": alpha, "dropout": 0.0,
                   "target_modules": targets})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = {}
    if form == "full":
        for key, value in original.state_dict().items():
            if key == "lm_head.weight" and original.config.tie_word_embeddings:
                continue
            tensors[f"model.{key}"] = value.contiguous()
    for module, values in parts.items():
        for part, value in values.items():
            if form == "full" or part != "weight":
                value = value if part == "weight" else torch.from_numpy(np.ascontiguousarray(value))
                tensors[f"model.{module}.{part}"] = value
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    head = {"largest_change": float(f"{size:.4g}")}
    if form == "full":
        head["unrounded"] = measure(full, ids)
    write_expected(folder, base, head, measure(model, ids))
    total = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{name:24} {base:12} change {size:6.3f}  full/compact {worst:.1e}  {total / 1024:6.0f} KiB", flush=True)


def sorsa_full():
    sorsa_case("sorsa-full", "llama-linear", 4, None, ALL, "full")


def sorsa_compact():
    sorsa_case("sorsa-compact", "llama-linear", 4, None, ALL, "compact")


def sorsa_compact_alpha():
    sorsa_case("sorsa-compact-alpha", "llama-bias", 4, 6.0, ["self_attn", "down_proj"], "compact",
               whole_config=False)


# name -> (function, base, kind); a function may write two folders.
CASES = {
    "lora-all": (lora_all, "qwen2", "lora"),
    "lora-kv": (lora_kv, "qwen3", "lora"),
    "lora-bf16": (lora_bf16, "qwen2", "lora"),
    "fan-in-fan-out": (fan_in_fan_out, "qwen2", "lora"),
    "rslora-patterns": (rslora_patterns, "llama3", "lora"),
    "patterns-unsorted": (patterns_unsorted, "llama-linear", "lora"),
    "regex-targets": (regex_targets, "llama3", "lora"),
    "all-linear": (all_linear, "llama-linear", "lora"),
    "all-linear-string": (all_linear_string, "llama-linear", "lora"),
    "layers-to-transform": (layers_to_transform, "llama3", "lora"),
    "layers-pattern": (layers_pattern, "llama3", "lora"),
    "exclude-modules": (exclude_modules, "llama3", "lora"),
    "lora-bias": (lora_bias, "qwen2", "lora-bias"),
    "lora-bias-merged": (lora_bias_merged, "llama-bias", "lora-bias"),
    "bias-all": (bias_all, "llama-bias", "base-bias"),
    "bias-lora-only": (bias_lora_only, "llama-bias", "base-bias"),
    "modules-to-save": (modules_to_save, "llama3", "modules-to-save"),
    "modules-to-save-embed": (modules_to_save_embed, "llama3", "modules-to-save"),
    "modules-to-save-norms": (modules_to_save_norms, "llama3", "modules-to-save"),
    "modules-to-save-qk": (modules_to_save_qk, "qwen3", "modules-to-save"),
    "modules-to-save-proj": (modules_to_save_proj, "llama-linear", "modules-to-save"),
    "modules-to-save-proj-bias": (modules_to_save_proj_bias, "llama-bias", "modules-to-save"),
    "embed-lora": (embed_lora, "llama3", "embed-lora"),
    "embed-lora-lean": (embed_lora_lean, "llama3", "embed-lora"),
    "embed-lora-ensure-tied": (embed_lora_ensure_tied, "llama3", "embed-lora"),
    "head-lora": (head_lora, "qwen3", "head-lora"),
    "head-lora-tied": (head_lora_tied, "qwen2", "head-lora"),
    "trainable-tokens": (trainable_tokens, "llama3", "refused"),
    "resized-tied": (resized_tied, "llama3", "resized"),
    "resized-saved": (resized_saved, "qwen3", "resized"),
    "resized-grown": (resized_grown, "qwen3", "refused"),
    "dora": (dora, "llama-bias", "dora"),
    "dora-rslora": (dora_rslora, "qwen3", "dora"),
    "dora-embed": (dora_embed, "llama-linear", "dora"),
    "eva": (eva, "llama-bias", "eva"),
    "pissa": (pissa, "llama-linear", "pissa"),
    "pissa-converted": (pissa, "llama-linear", "pissa-converted"),
    "pissa-rslora": (pissa_rslora, "llama-linear", "pissa"),
    "pissa-rslora-converted": (pissa_rslora, "llama-linear", "pissa-converted"),
    "pissa-patterns": (pissa_patterns, "llama-linear", "pissa"),
    "pissa-patterns-converted": (pissa_patterns, "llama-linear", "pissa-converted"),
    "pissa-niter": (pissa_niter, "llama-linear", "pissa"),
    "pissa-niter-1000": (pissa_niter_1000, "llama-linear", "pissa"),
    "pissa-residual": (pissa_residual, "llama-linear", "pissa-residual"),
    "olora": (olora, "llama-linear", "olora"),
    "olora-converted": (olora, "llama-linear", "olora-converted"),
    "pissa-embed": (pissa_embed, "llama-linear", "pissa"),
    "pissa-niter-embed": (pissa_niter_embed, "llama-linear", "pissa"),
    "olora-embed": (olora_embed, "llama-linear", "olora"),
    "pissa-head": (pissa_head, "llama-linear", "pissa"),
    "pissa-head-lean": (pissa_head_lean, "llama-linear", "pissa"),
    "pissa-head-tied": (pissa_head_tied, "llama3", "refused"),
    "olora-head": (olora_head, "llama-linear", "olora"),
    "corda-converted": (corda, "llama-linear", "corda-converted"),
    "lora-ga-converted": (loraga, "llama-linear", "lora-ga-converted"),
    "sorsa-full": (sorsa_full, "llama-linear", "sorsa"),
    "sorsa-compact": (sorsa_compact, "llama-linear", "sorsa"),
    "sorsa-compact-alpha": (sorsa_compact_alpha, "llama-bias", "sorsa"),
}


def main():
    torch.set_num_threads(1)
    done = []
    for name in sys.argv[1:] or CASES:
        function = CASES[name][0]
        if function not in done:
            function()
            done.append(function)
    index = [{"name": n, "base": base, "kind": kind} for n, (_, base, kind) in CASES.items() if (HERE / n).exists()]
    (HERE / "index.json").write_text("[\n" + ",\n".join("  " + json.dumps(e) for e in index) + "\n]\n")
    total = sum(f.stat().st_size for f in HERE.rglob("*") if f.is_file())
    print(f"{len(index)} of {len(CASES)} cases, {total / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
