//! Calibration prompts of the demo model's own kind: records of lines, key-value lists, pass-keys in filler and chains of
//! variables, in the words and formats it was trained on.

use std::collections::HashSet;

use super::text::Draw;

pub(crate) const ADJECTIVES: &str = "amber ancient angry bitter black blue bold brave brief bright broad broken brown calm careful cheap clean clever \
cold crimson cruel curly damp dark deep dense dizzy dry dull eager early easy elegant empty faint fair famous fancy fast fierce fine flat \
foreign fresh gentle giant glad golden grand gray great green happy harsh heavy hidden hollow honest huge humble hungry icy idle jolly keen \
kind large lazy light little lonely long loud lucky mad mellow mild modern narrow neat noble noisy odd old orange pale plain polite proud \
purple quick quiet rapid rare raw red rich ripe rough round royal rusty sad salty sharp shiny short shy silent silly silver simple slow \
small smooth soft solid sour steady steep sticky strange strong sunny sweet swift tall tame tender thin tiny tired torpid vague vast violet \
warm weak wet white wicked wide wild wise wooden yellow young zesty";
pub(crate) const NOUNS: &str = "anchor ant apple apron arrow badge bag ball banana barn basket beach bear bee bell bench bird boat book bottle bowl box \
branch bread brick bridge broom brush bucket button cabin cake camel candle canyon carpet castle cat chair cheese cherry clock cloud coat \
coin comet cookie cow crab crown cup curtain deer desk dog dolphin door dove dragon dream drum duck eagle egg engine falcon farm feather \
fence field fire fish flag flame flower forest fork fox frog garden gate ghost glove goat grape guitar hammer harbor hat hawk hill horse \
house island jacket jar jewel kettle key kid kite knife ladder lake lamp leaf lemon letter lion lizard lock map market meadow melon mirror \
monkey moon mountain mouse needle nest ocean onion orchid otter owl paint panda paper parrot peach pencil piano pigeon pillow pilot planet \
plate pond pony potato puzzle queen rabbit radio rain river road robot rocket rope rose sail salmon school shadow sheep shell ship shirt \
shoe snake song spider spoon star stone storm stove street swan table temple tiger tower town train tree truck turtle valley violin wagon \
wall watch whale wheel wind window wolf wood worm yard zebra";
const FILLER: [&str; 5] = ["The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again."];
const PEOPLE: [&str; 8] = ["Anna", "Carla", "David", "Frank", "Henry", "Maria", "Oscar", "Rosa"];
const PLACES: [&str; 8] = ["market", "river", "school", "library", "harbor", "museum", "bakery", "theater"];
const FOODS: [&str; 8] = ["apples", "bread", "cheese", "soup", "honey", "tea", "grapes", "pasta"];
const JOBS: [&str; 6] = ["teacher", "doctor", "baker", "sailor", "painter", "gardener"];
const LINES_HEAD: [&str; 4] = [
    "Below is a record of lines I want you to remember. Each line begins with a line name and contains a REGISTER_CONTENT at the end of the line \
     as a numerical value. At the end of the record, I will ask you for the REGISTER_CONTENT of a certain line. Now the record start:\n",
    "Here is a record of lines:\n",
    "Remember these lines:\n",
    "",
];
const LINES_TAIL: [&str; 4] = [
    "Now the record is over. Tell me what is the REGISTER_CONTENT in line {}? I need the number.",
    "Now the record is over. What is the REGISTER_CONTENT in line {}?",
    "what is the REGISTER_CONTENT in line {}?",
    "What is the REGISTER_CONTENT in line {}?",
];

/// A record, and (asked name, answer) pairs about it, in the order of the record.
struct Task {
    context: String,
    answers: Vec<(String, String)>,
    questions: &'static [&'static str],
}

/// `n` conversations of about `chars` characters each (some 2.6 to a token), with the special tokens of the demo model's
/// template written out; kinds take turns. The same arguments give the same prompts, and no name in them is one that
/// held-out prompts use.
pub fn demo_prompts(n: usize, chars: usize) -> Vec<String> {
    (0..n).map(|i| conversation(&mut Draw::new(0x57a1_7000 + i as u64), i, chars)).collect()
}

fn conversation(draw: &mut Draw, kind: usize, chars: usize) -> String {
    // Most of a conversation is its record; the questions that follow make it multi-turn.
    let record = chars * 4 / 5;
    let task = match kind % 4 {
        0 => lines(draw, record),
        1 => key_values(draw, record),
        2 => pass_keys(draw, record),
        _ => variables(draw, record),
    };
    let mut text = format!("<|bos|><|user|>\n{}", task.context);
    loop {
        let (name, answer) = &task.answers[draw.below(task.answers.len())];
        let question = draw.pick(task.questions).replace("{}", name);
        text += &format!("{question}<|end|>\n<|assistant|>\n{answer}<|end|>\n");
        if text.len() >= chars {
            return text;
        }
        text += "<|user|>\n";
    }
}

fn lines(draw: &mut Draw, chars: usize) -> Task {
    let mut context = draw.pick(&LINES_HEAD).to_string();
    let mut answers = Vec::new();
    for name in names(draw, (chars / 42).max(2)) {
        let line = format!("line {name}: REGISTER_CONTENT is <{}>", number(draw, 5));
        context += &format!("{line}\n");
        answers.push((name, line));
    }
    Task { context, answers, questions: &LINES_TAIL }
}

fn key_values(draw: &mut Draw, chars: usize) -> Task {
    let separator = *draw.pick(&[": ", " = ", " -> "]);
    let digits = 3 + draw.below(4);
    let n = (chars / 23).max(2);
    let nouns: Vec<&str> = NOUNS.split(' ').collect();
    let keys = if n < nouns.len() && draw.below(5) < 2 { draw.sample(&nouns, n) } else { names(draw, n) };
    let words = draw.below(10) < 3;
    let mut context = draw.pick(&["Here is a list of keys and values:\n", "Remember this list:\n", "List:\n", ""]).to_string();
    let mut answers = Vec::new();
    for key in keys {
        let value = if words { draw.pick(&nouns).to_string() } else { number(draw, digits) };
        let record = format!("key {key}{separator}{value}");
        context += &format!("{record}\n");
        answers.push((key, record));
    }
    Task { context, answers, questions: &["What is the value of key {}?", "What is key {}?", "Look up key {}.", "key {}?"] }
}

fn pass_keys(draw: &mut Draw, chars: usize) -> Task {
    let form = *draw.pick(&["pass key for the {}", "secret number of the {}", "code of the {}"]);
    let n = (1 + draw.below(8)).min((chars / 150).max(1));
    let mut paragraphs = Vec::new();
    let mut written = 0;
    while written < chars {
        let paragraph = filler(draw);
        written += paragraph.len() + 1;
        paragraphs.push(paragraph);
    }
    let mut answers = Vec::new();
    for name in names(draw, n) {
        let (what, value) = (form.replace("{}", &name), number(draw, 5));
        let mut needle = format!("The {what} is {value}.");
        answers.push((what.clone(), needle.clone()));
        if draw.below(10) < 3 {
            needle += &format!(" Remember it. {value} is the {what}.");
        }
        let at = draw.below(paragraphs.len() + 1);
        paragraphs.insert(at, needle);
    }
    let head = *draw.pick(&["There is important info hidden inside a lot of text. Find it and remember it.\n", "Read the text.\n", ""]);
    let questions = &["What is the {}?", "Tell me the {}.", "What is the {} in the text?"];
    Task { context: format!("{head}{}\n", paragraphs.join("\n")), answers, questions }
}

/// Variables set to numbers or to earlier variables, at most two steps deep; the answer spells the chain out.
fn variables(draw: &mut Draw, chars: usize) -> Task {
    let n = (chars / 22).max(2);
    let nouns: Vec<&str> = NOUNS.split(' ').collect();
    let pool = if n < nouns.len() / 2 && draw.below(10) < 7 { draw.sample(&nouns, n) } else { names(draw, n) };
    let mut context = draw.pick(&["Here are some variables:\n", "Remember the variables:\n", ""]).to_string();
    let mut known: Vec<(String, usize, String)> = Vec::new(); // value, depth, chain
    let mut answers = Vec::new();
    for (i, name) in pool.iter().enumerate() {
        let source = i.saturating_sub(40) + draw.below(i.clamp(1, 40));
        let one = match known.get(source).filter(|s| s.1 < 2) {
            Some((value, depth, chain)) if draw.below(10) < 4 => {
                context += &format!("VAR {name} = VAR {}\n", pool[source]);
                (value.clone(), depth + 1, format!("VAR {name} = VAR {}. {chain}", pool[source]))
            }
            _ => {
                let value = number(draw, 5);
                context += &format!("VAR {name} = {value}\n");
                (value.clone(), 0, format!("VAR {name} = {value}."))
            }
        };
        let answer = if one.1 == 0 { one.2.clone() } else { format!("{} So {name} = {}.", one.2, one.0) };
        answers.push((name.clone(), answer));
        known.push(one);
    }
    Task { context, answers, questions: &["What is the value of {}?", "What is VAR {}?", "What is {}?"] }
}

fn filler(draw: &mut Draw) -> String {
    match draw.below(4) {
        0 => FILLER.join(" "),
        1 => (0..2 + draw.below(5)).map(|_| *draw.pick(&FILLER)).collect::<Vec<_>>().join(" "),
        _ => story(draw),
    }
}

fn story(draw: &mut Draw) -> String {
    let people = draw.sample(&PEOPLE, 2);
    let places = draw.sample(&PLACES, 2);
    let ([p, q], [here, there]) = ([&people[0], &people[1]], [&places[0], &places[1]]);
    let food = *draw.pick(&FOODS);
    let job = *draw.pick(&JOBS);
    let nouns: Vec<&str> = NOUNS.split(' ').collect();
    let adjectives: Vec<&str> = ADJECTIVES.split(' ').collect();
    let (thing, animal, how) = (*draw.pick(&nouns), *draw.pick(&nouns), *draw.pick(&adjectives));
    let count = 2 + draw.below(19);
    let first = [
        format!("{p} is a {job} who lives near the {here}."),
        format!("{p} and {q} met at the {here}."),
        format!("In a {how} town there was a {job} called {p}."),
    ];
    let body = [
        format!("{p} wanted to buy {food} for {q}."),
        format!("{q} asked {p} about the {thing}."),
        format!("The {thing} was {how}, and {q} liked it very much."),
        format!("On the way to the {there}, {p} saw a {how} {animal}."),
        format!("\"Look at the {animal},\" said {q}."),
        format!("\"Where is my {thing}?\" asked {p}."),
        format!("\"It is at the {there},\" said {q}."),
        format!("{p} gave {count} {food} to {q}."),
        format!("It was late, and the {here} was quiet."),
    ];
    let body: Vec<&str> = body.iter().map(String::as_str).collect();
    let last = [format!("In the end, {p} went home with the {thing}."), format!("{p} thanked {q} and smiled.")];
    let n = 1 + draw.below(5);
    let body = draw.sample(&body, n).join(" ");
    format!("{} {body} {}", draw.pick(&first), draw.pick(&last))
}

/// `n` different adjective-noun names of the training split: those whose CRC-32 is not a multiple of 10.
/// There are some 26,000.
fn names(draw: &mut Draw, n: usize) -> Vec<String> {
    let adjectives: Vec<&str> = ADJECTIVES.split(' ').collect();
    let nouns: Vec<&str> = NOUNS.split(' ').collect();
    let mut seen = HashSet::new();
    let mut names = Vec::new();
    // Past a third of all names, draws would mostly repeat: a longer record then goes on with what it has.
    for _ in 0..n.min(8000) * 20 {
        if names.len() == n.min(8000) {
            break;
        }
        let name = format!("{}-{}", draw.pick(&adjectives), draw.pick(&nouns));
        if !held_out(&name) && seen.insert(name.clone()) {
            names.push(name);
        }
    }
    names
}

fn number(draw: &mut Draw, digits: usize) -> String {
    let low = 10_usize.pow(digits as u32 - 1);
    (low + draw.below(9 * low)).to_string()
}

fn held_out(name: &str) -> bool {
    crc32(name.as_bytes()).is_multiple_of(10)
}

/// CRC-32 as in zlib.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, &b| (0..8).fold(crc ^ u32::from(b), |crc, _| (crc >> 1) ^ (0xedb8_8320 & 0_u32.wrapping_sub(crc & 1))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_the_same_each_time_and_spare_the_held_out_names() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926); // the check value of CRC-32
        let prompts = demo_prompts(12, 3000);
        assert_eq!(prompts, demo_prompts(12, 3000));
        for (i, p) in prompts.iter().enumerate() {
            assert!((2900..4200).contains(&p.len()), "prompt {i} has {} characters", p.len());
            assert!(p.starts_with("<|bos|><|user|>\n") && p.ends_with("<|end|>\n"));
            assert_eq!(p.matches("<|user|>").count(), p.matches("<|assistant|>").count());
            for word in p.split(|c: char| !c.is_ascii_lowercase() && c != '-').filter(|w| w.contains('-')) {
                assert!(!held_out(word), "{word} in prompt {i}");
            }
        }
        for (kind, mark) in ["REGISTER_CONTENT is <", "key ", ". ", "VAR "].into_iter().enumerate() {
            assert!(prompts[kind].matches(mark).count() > 10, "{}", prompts[kind]);
        }
    }

    #[test]
    fn an_answer_about_a_chain_of_variables_follows_from_its_record() {
        for seed in 0..20 {
            let task = variables(&mut Draw::new(seed), 1500);
            let set: std::collections::HashMap<&str, &str> =
                task.context.lines().filter_map(|l| l.strip_prefix("VAR ")?.split_once(" = ")).collect();
            for (name, answer) in &task.answers {
                let mut value = set[name.as_str()];
                while let Some(next) = value.strip_prefix("VAR ") {
                    value = set[next];
                }
                assert!(answer.ends_with(&format!("{name} = {value}.")), "{answer}");
            }
        }
    }
}
