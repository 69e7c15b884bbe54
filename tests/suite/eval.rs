//! What `strait eval` measures: generated questions as transcripts, scoring and intervals against known values, text forced
//! through tiny models against the engine's own decoding, and files of prompts. Whom it asks, and the command, are in
//! `eval_command.rs`.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use expect_test::{Expect, expect};
use serde_json::json;
use strait::calibrate::{self, Moments, demo_prompts};
use strait::compress::artifact::Fingerprint;
use strait::engine::thread::{Host, Parts, Runner, start};
use strait::eval::forced::{ForcedError, Machine, Said, force};
use strait::eval::run::read_questions;
use strait::eval::score::{Block, Rule, changed, student, t_point, wilson};
use strait::eval::tasks::{FitError, Material, Niah, Question, Style, Task, fit, seed_of, sentences};
use strait::ids::TokenId;
use strait::kv::Arena;
use strait::kv::layout::{BasisKind, Cskv, ExactType, PageLayout, Profile};
use strait::model::checkpoint::Checkpoint;
use strait::model::decoder::{Decoder, ReadyProfile};
use strait::model::delta::Delta;
use strait::model::weights::LoadDtype;
use strait::ops::cpu::Cpu;
use strait::request::{Event, GenerateRequest, Sampling};
use strait::scheduler::{self, ProfileSizes};

use crate::golden::folder;

// ---------------------------------------------------------------- generated questions

pub(crate) const PLAIN: Material<'_> = Material { haystack: &[], example: None, bare: false, style: Style::Plain };

fn all_tasks() -> Vec<Task> {
    let niah = Niah::ALL.map(|(kind, _)| Task::Niah(kind));
    [Task::Lines, Task::Topics, Task::Vt, Task::Kv].into_iter().chain(niah).collect()
}

fn text_of(q: &Question) -> String {
    q.prompt
        .as_array()
        .unwrap()
        .iter()
        .map(|m| format!("{}: {}", m["role"].as_str().unwrap(), m["content"].as_str().unwrap()))
        .collect::<Vec<_>>()
        .join("\n")
}

fn transcript(task: Task, size: usize, material: Material<'_>, want: &Expect) {
    let q = task.question(seed_of(1, task, 512, 0), size, material).unwrap();
    let ends = if q.continues { "" } else { "\n" };
    want.assert_eq(&format!("{}{ends}[{:?} {:?} in {} tokens]\n", text_of(&q), q.rule, q.references, q.max_tokens));
}

#[test]
fn lines_and_keys() {
    transcript(
        Task::Lines,
        3,
        Material::default(),
        &expect![[r#"
        user: Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a '<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of a certain line index. Now the record start:

        line easy-bird: REGISTER_CONTENT is <35454>
        line rapid-bridge: REGISTER_CONTENT is <36836>
        line salty-broom: REGISTER_CONTENT is <24422>

        Now the record is over. Tell me what is the <REGISTER_CONTENT> in line rapid-bridge? I need the number.
        [LastNumber ["36836"] in 100 tokens]
    "#]],
    );
    transcript(
        Task::Kv,
        3,
        Material::default(),
        &expect![[r#"
        user: Here is a list of keys and values:
        key fair-cup: 37562
        key easy-hat: 25715
        key honest-bench: 29022
        What is the value of key easy-hat?
        [LastNumber ["25715"] in 50 tokens]
    "#]],
    );
}

#[test]
fn topics() {
    transcript(
        Task::Topics,
        3,
        Material::default(),
        &expect![[r#"
        user: Below is a record of our previous conversation on 2 different topics. You are the ASSISTANT, and I am the USER. At the beginning of each topic, the USER will say 'I would like to discuss the topic of <TOPIC>'. Memorize each <TOPIC>. At the end of the record, I will ask you to retrieve the first topic. Now the record start. 
        USER: I would like to discuss the topic of the art of bread baking.
        ASSISTANT: Sure! What would you like to know about it?
        USER: What is the biggest risk with oven steam?
        ASSISTANT: Overconfidence. Most accounts of trouble with oven steam begin with somebody who was sure of the result.
        USER: Who should I ask about kneading?
        ASSISTANT: Someone who has failed at it before. People with long experience of kneading know its limits, and that is the useful part.
        USER: I would like to discuss the topic of the culture of tea ceremonies.
        ASSISTANT: Sure! What would you like to know about it?
        USER: What has changed about silence over the years?
        ASSISTANT: More than most people think. What was once said about silence came from custom; today there are measurements to go by.
         Now the record ends. What is the first topic(s) we discussed? Only give me the topic name. Do not summarize yourself.
        [Found ["the art of bread baking"] in 50 tokens]
    "#]],
    );
}

#[test]
fn needles() {
    let hay = sentences("One is here. Two is\nthere! Is three? Four");
    assert_eq!(hay, ["One is here.", "Two is there!", "Is three?", "Four"]);
    let given = Material { haystack: &hay, ..Material::default() };
    transcript(
        Task::Niah(Niah::Single1),
        2,
        Material::default(),
        &expect![[r#"
        user: A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the number afterwards.
        One of the special magic numbers for dizzy-jewel is: 7393644.
        The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.
        The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.
        What is the special magic number for dizzy-jewel mentioned in the provided text?
        assistant:  The special magic number for dizzy-jewel mentioned in the provided text is[Found ["7393644"] in 128 tokens]
    "#]],
    );
    transcript(
        Task::Niah(Niah::Single3),
        2,
        Material::default(),
        &expect![[r#"
        user: A special magic uuid is hidden within the following text. Make sure to memorize it. I will quiz you about the uuid afterwards.
        One of the special magic uuids for vast-robot is: 54955215-4739-4327-a08d-eb8d854a72c2. The key was icy, and Ben liked it very much. Ben and Anna met at the forest.
        What is the special magic uuid for vast-robot mentioned in the provided text?
        assistant:  The special magic uuid for vast-robot mentioned in the provided text is[Found ["54955215-4739-4327-a08d-eb8d854a72c2"] in 128 tokens]
    "#]],
    );
    transcript(
        Task::Niah(Niah::MultiKey1),
        6,
        given,
        &expect![[r#"
        user: A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the number afterwards.
        One of the special magic numbers for glad-whale is: 5477344. One of the special magic numbers for icy-school is: 6079930. One is here. Two is there! Is three? One of the special magic numbers for light-needle is: 1588481. One of the special magic numbers for quiet-pencil is: 1800951. Four One is here. Two is there!
        What is the special magic number for glad-whale mentioned in the provided text?
        assistant:  The special magic number for glad-whale mentioned in the provided text is[Found ["5477344"] in 128 tokens]
    "#]],
    );
    transcript(
        Task::Niah(Niah::MultiKey3),
        2,
        Material::default(),
        &expect![[r#"
        user: A special magic uuid is hidden within the following text. Make sure to memorize it. I will quiz you about the uuid afterwards.
        One of the special magic uuids for 2e7cf8c3-1f20-4b46-9d57-3be313969771 is: 3ea7b6c0-7c9d-4958-bd8c-fba4739fb641.
        One of the special magic uuids for edb55e85-f523-4f31-8b6b-3409105ee56e is: 8ed2e09d-041c-4454-9490-8c7bcf19ce38.
        One of the special magic uuids for 132da177-d4d9-4cbf-8bb3-23aaf2c02296 is: 15643d27-2517-4e14-b065-35f8e3d4a663.
        What is the special magic uuid for edb55e85-f523-4f31-8b6b-3409105ee56e mentioned in the provided text?
        assistant:  The special magic uuid for edb55e85-f523-4f31-8b6b-3409105ee56e mentioned in the provided text is[Found ["8ed2e09d-041c-4454-9490-8c7bcf19ce38"] in 128 tokens]
    "#]],
    );
    transcript(
        Task::Niah(Niah::MultiValue),
        4,
        given,
        &expect![[r#"
        user: Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about the numbers afterwards.
        One of the special magic numbers for bitter-wood is: 8999323. One of the special magic numbers for bitter-wood is: 6703303. One is here. One of the special magic numbers for bitter-wood is: 4854383. Two is there! One of the special magic numbers for bitter-wood is: 2871424. Is three? Four
        What are all the special magic numbers for bitter-wood mentioned in the provided text?
        assistant:  The special magic numbers for bitter-wood mentioned in the provided text are[Found ["6703303", "2871424", "4854383", "8999323"] in 128 tokens]
    "#]],
    );
    transcript(
        Task::Niah(Niah::MultiQuery),
        4,
        Material { bare: true, ..given },
        &expect![[r#"
        user: Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about the numbers afterwards.
        One of the special magic numbers for solid-flower is: 6962204. One of the special magic numbers for large-badge is: 7703608. One is here. Two is there! One of the special magic numbers for dark-ball is: 5775184. Is three? One of the special magic numbers for white-fire is: 3276294. Four
        What are all the special magic numbers for solid-flower, dark-ball, white-fire, and large-badge mentioned in the provided text?
        [Found ["6962204", "5775184", "3276294", "7703608"] in 128 tokens]
    "#]],
    );
    transcript(
        Task::Niah(Niah::MultiKey2),
        2,
        PLAIN,
        &expect![[r#"
        user: There is important info hidden inside a lot of text. Find it and remember it.
        The code of the noisy-anchor is 88480.
        The code of the bold-hill is 78945.
        The code of the large-rain is 93698.
        What is the code of the bold-hill?
        [Found ["78945"] in 128 tokens]
    "#]],
    );
}

#[test]
fn variables() {
    transcript(
        Task::Vt,
        5,
        Material::default(),
        &expect![[r#"
        user: Memorize and track the chain(s) of variable assignment hidden in the following text.

        VAR FZKKT = 56953
        The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.
        VAR CDVCF = VAR FZKKT 
        The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.
        VAR GQQZT = VAR CDVCF 
        The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.
        VAR EFIPL = VAR GQQZT 
        The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.
        VAR OOSLJ = VAR EFIPL 
        The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.
        Question: Find all variables that are assigned the value 56953 in the text above.
        assistant:  Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned the value 56953, they are: [Found ["FZKKT", "CDVCF", "GQQZT", "EFIPL", "OOSLJ"] in 30 tokens]
    "#]],
    );
    transcript(
        Task::Vt,
        6,
        PLAIN,
        &expect![[r#"
        user: Here are some variables:
        VAR cold-lamp = 19920
        VAR cruel-flag = 82936
        VAR gentle-castle = 46611
        VAR black-island = 33274
        VAR lucky-window = VAR black-island
        VAR mild-rabbit = VAR cruel-flag
        What is the value of lucky-window?
        [LastNumber ["33274"] in 64 tokens]
    "#]],
    );
}

#[test]
fn a_seed_repeats_and_others_differ() {
    for task in all_tasks() {
        for style in [Style::Ruler, Style::Plain] {
            let material = Material { style, ..Material::default() };
            let make = |seed, length, index| task.question(seed_of(seed, task, length, index), 12, material).unwrap();
            assert_eq!(make(7, 512, 3), make(7, 512, 3));
            for other in [make(8, 512, 3), make(7, 1024, 3), make(7, 512, 4)] {
                assert_ne!(make(7, 512, 3).prompt, other.prompt, "{task}");
            }
        }
    }
}

#[test]
fn an_answer_is_in_the_prompt_once_and_can_be_found() {
    for seed in 0..40 {
        for task in all_tasks() {
            for style in [Style::Ruler, Style::Plain] {
                if matches!(task, Task::Topics | Task::Vt) {
                    continue;
                }
                let q = task.question(seed, 5 + seed as usize, Material { style, ..Material::default() }).unwrap();
                let text = q.prompt[0]["content"].as_str().unwrap();
                for reference in &q.references {
                    let whole = |c: char| c.is_ascii_alphanumeric() || c == '-';
                    let times = text.split(|c| !whole(c)).filter(|word| word == reference).count();
                    assert_eq!(times, 1, "{task}: {reference} in {text}");
                }
                // Where there is one answer, it stands in the line or sentence of the asked name, and nowhere else.
                let (record, ask) = text.rsplit_once('\n').unwrap();
                if let [only] = &q.references[..] {
                    let name = ask.split([' ', '?', '.']).rfind(|word| word.contains('-')).unwrap();
                    let names = |line: &&str| line.split([' ', ':']).any(|word| word == name);
                    let found: Vec<&str> = record.split(['\n', '.']).filter(names).collect();
                    assert!(found.len() == 1 && found[0].contains(only.as_str()), "{task} {name}: {found:?}");
                }
            }
        }
    }
}

#[test]
fn keys_of_a_record_are_different() {
    for (task, mark) in [(Task::Lines, "line "), (Task::Kv, "key "), (Task::Vt, "VAR ")] {
        let q = task.question(3, 2000, PLAIN).unwrap();
        let text = q.prompt[0]["content"].as_str().unwrap();
        let names: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix(mark)?.split([':', ' ']).next()).collect();
        assert_eq!(names.len(), 2000, "{task}");
        assert_eq!(names.iter().collect::<HashSet<_>>().len(), 2000, "{task}");
    }
    // There are some 29,000 names; more lines than that are refused rather than repeated.
    assert!(Task::Lines.question(0, 20_000, PLAIN).is_some());
    assert_eq!(Task::Lines.question(0, 40_000, PLAIN), None);
}

#[test]
fn chains_of_variables_lead_to_the_answer() {
    for seed in 0..30 {
        let q = Task::Vt.question(seed, 40, Material { example: Some(6), ..Material::default() }).unwrap();
        let text = q.prompt[0]["content"].as_str().unwrap();
        assert_eq!(text.matches("Memorize and track").count(), 2, "the example comes first");
        let asked = &text[text.rfind("Memorize and track").unwrap()..];
        let value = asked.rsplit_once("the value ").unwrap().1.split(' ').next().unwrap();
        let set = asked.lines().filter_map(|l| l.strip_prefix("VAR ")?.trim().split_once(" = "));
        // In order: each is set to a number, or to one that is known by then.
        let mut known: HashMap<&str, &str> = HashMap::new();
        for (name, to) in set {
            known.insert(name, to.strip_prefix("VAR ").map_or(to, |from| known[from]));
        }
        let mut right: Vec<&str> = known.iter().filter(|(_, v)| **v == value).map(|(name, _)| *name).collect();
        let mut want: Vec<&str> = q.references.iter().map(String::as_str).collect();
        right.sort_unstable();
        want.sort_unstable();
        assert_eq!((right.len(), right), (5, want));

        let q = Task::Vt.question(seed, 60, PLAIN).unwrap();
        let text = q.prompt[0]["content"].as_str().unwrap();
        let mut known: HashMap<&str, &str> = HashMap::new();
        for (name, to) in text.lines().filter_map(|l| l.strip_prefix("VAR ")?.split_once(" = ")) {
            known.insert(name, to.strip_prefix("VAR ").map_or(to, |from| known[from]));
        }
        let asked = text.rsplit_once("value of ").unwrap().1.trim_end_matches('?');
        assert_eq!(known[asked], q.references[0]);
    }
}

#[test]
fn the_first_topic_is_asked_for() {
    for (size, topics) in [(1, 2), (7, 3), (90, 30), (900, 30)] {
        let q = Task::Topics.question(size as u64, size, PLAIN).unwrap();
        let text = q.prompt[0]["content"].as_str().unwrap();
        let opened: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix("USER: I would like to discuss the topic of ")).collect();
        assert_eq!(opened.len(), topics);
        assert_eq!(opened.iter().collect::<HashSet<_>>().len(), topics);
        assert_eq!(opened[0].trim_end_matches('.'), q.references[0]);
        assert_eq!(text.lines().filter(|l| l.starts_with("USER:")).count(), topics + size);
    }
    assert_eq!(Task::Topics.question(0, 961, PLAIN), None);
}

/// Adjective-noun names in a text.
fn names_in(text: &str) -> HashSet<&str> {
    let letter = |c: char| c.is_ascii_lowercase() || c == '-';
    text.split(|c: char| !letter(c))
        .filter(|w| w.split('-').filter(|part| part.len() > 1).count() == 2 && w.matches('-').count() == 1)
        .collect()
}

#[test]
fn no_name_was_calibrated_on_and_every_word_was() {
    let calibrated = demo_prompts(400, 3000).join("\n");
    let seen = names_in(&calibrated);
    let parts: HashSet<&str> = seen.iter().flat_map(|name| name.split('-')).collect();
    for task in [Task::Lines, Task::Kv] {
        // As many as the longest context of the demo model takes.
        let q = task.question(5, 1200, PLAIN).unwrap();
        let text = q.prompt[0]["content"].as_str().unwrap().to_owned();
        let names = names_in(&text);
        assert!(names.len() >= 1200);
        for name in names {
            assert!(!seen.contains(name), "{name} is in the calibration prompts");
            assert!(name.split('-').all(|part| parts.contains(part)), "the demo model does not know {name}");
        }
    }
}

// ---------------------------------------------------------------- prompts of a length

/// Three bytes to a token.
async fn count(q: &Question) -> Result<u32, Infallible> {
    Ok(text_of(q).len().div_ceil(3) as u32)
}

#[tokio::test]
async fn prompts_fill_85_to_100_percent_of_a_length() {
    for task in all_tasks() {
        for budget in [600, 1024, 5000, 20_000] {
            for index in 0..3 {
                let seed = seed_of(0, task, budget, index);
                let asked = AtomicUsize::new(0);
                let counting = async |q: &Question| {
                    asked.fetch_add(1, Ordering::Relaxed);
                    count(q).await
                };
                let fitted = fit("it", budget, task.least(), |size| task.question(seed, size, Material::default()), counting).await;
                let (q, tokens, _) = fitted.unwrap().unwrap_or_else(|e| panic!("{task} {budget}: {e}"));
                assert_eq!(tokens, count(&q).await.unwrap());
                assert!(tokens <= budget && tokens * 100 >= budget * 85, "{task} {budget}: {tokens}");
                assert!(asked.into_inner() <= 9, "{task} {budget}");
            }
        }
    }
}

#[tokio::test]
async fn a_length_that_a_task_cannot_have_is_refused() {
    let make = |task: Task| move |size| task.question(1, size, Material::default());
    let short = fit("lines", 50, 2, make(Task::Lines), count).await.unwrap();
    assert!(matches!(short, Err(FitError::TooShort { budget: 50, least: 51.., .. })), "{short:?}");
    let long = fit("topics", 1_000_000, 1, make(Task::Topics), count).await.unwrap();
    let Err(FitError::TooLong { most, .. }) = long else { panic!("{long:?}") };
    let all = make(Task::Topics)(960).unwrap();
    assert_eq!(most, count(&all).await.unwrap(), "as far as the words go");
    // Pieces too coarse for the margin: the largest that fits.
    let coarse = |size: usize| {
        let prompt = json!([{ "role": "user", "content": "x".repeat(3000 * size) }]);
        Some(Question { prompt, continues: false, rule: Rule::Found, references: vec![], max_tokens: 1 })
    };
    let (_, tokens, size) = fit("coarse", 1900, 1, coarse, count).await.unwrap().unwrap();
    assert_eq!((tokens, size), (1002, 1));
}

// ---------------------------------------------------------------- scores and intervals

#[test]
fn answers_are_scored_by_their_rule() {
    for (rule, answer, references, want) in [
        (Rule::LastNumber, "line a-b: REGISTER_CONTENT is <123>", &["123"][..], 1.0),
        (Rule::LastNumber, "123, no, 45", &["123"], 0.0),
        (Rule::LastNumber, "45, no, 0123.", &["123"], 1.0),
        (Rule::LastNumber, "1234", &["123"], 0.0),
        (Rule::LastNumber, "none", &["123"], 0.0),
        (Rule::LastNumber, "", &["0"], 0.0),
        (Rule::LastNumber, "It is 0.", &["0"], 1.0),
        (Rule::LastNumber, "١٢٣", &["123"], 0.0),
        (Rule::LastWord, "key x is lion.", &["lion"], 1.0),
        (Rule::LastWord, "lions", &["lion"], 0.0),
        (Rule::LastWord, "the amber-lion", &["amber-lion"], 1.0),
        (Rule::LastWord, "...", &["lion"], 0.0),
        (Rule::Found, "ABCDE and fghij", &["abcde", "FGHIJ", "klmno", "pqrst"], 0.5),
        (Rule::Found, "The first was The Physics Of Sailing.", &["the physics of sailing"], 1.0),
        (Rule::Found, "anything", &[], 0.0),
    ] {
        let references: Vec<String> = references.iter().map(|s| (*s).to_owned()).collect();
        assert_eq!(rule.score(answer, &references), want, "{rule:?} {answer}");
    }
    assert_eq!(changed(&[1.0, 1.0, 0.0, 0.5], &[0.0, 1.0, 1.0, 0.25]), (2, 1));
}

#[test]
fn intervals_are_the_textbooks() {
    // Right of n; the bounds as R's prop.test(correct = FALSE) and statsmodels give them.
    for (right, n, low, high) in
        [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (49, 50, 0.8950, 0.9965), (263, 1000, 0.2366, 0.2912)]
    {
        let scores: Vec<f64> = (0..n).map(|i| f64::from(u8::from(i < right))).collect();
        let e = wilson(&scores).unwrap();
        assert!((e.low - low).abs() < 1e-4 && (e.high - high).abs() < 1e-4, "{right}/{n}: {e}");
        assert_eq!(e.mean, f64::from(right) / f64::from(n));
    }
    assert_eq!(wilson(&[]), None);
    // The 97.5 % points of Student's table.
    for (freedom, want) in
        [(1, 12.7062), (4, 2.7764), (10, 2.2281), (11, 2.2010), (15, 2.1314), (30, 2.0423), (120, 1.9799), (100_000, 1.9600)]
    {
        assert!((t_point(freedom) - want).abs() < 2e-4, "{freedom}: {}", t_point(freedom));
    }
    let of = |sums: &[f64]| student(&sums.iter().map(|&sum| Block { n: 1, sum }).collect::<Vec<_>>());
    let e = of(&[1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
    assert!((e.mean - 3.0).abs() < 1e-12 && (e.high - 3.0 - 1.963_24).abs() < 1e-3 && (3.0 - e.low - 1.963_24).abs() < 1e-3, "{e}");
    assert_eq!(of(&[1.0]), None);
    // A long block counts for its tokens.
    let e = student(&[Block { n: 64, sum: 64.0 }, Block { n: 32, sum: 128.0 }]).unwrap();
    assert_eq!(e.mean, 2.0);
}

// ---------------------------------------------------------------- forced text

const POSITIONS: usize = 768;

/// `full`; all directions at 16 bits; a fifth of them; a fifth at 4 bits, without sinks and with another window.
fn profiles() -> Vec<Profile> {
    let cskv = |name: &str, share, bits, sinks, window| Profile {
        name: name.into(),
        cskv: Some(Cskv::shares((share, share), bits, (window, sinks), BasisKind::Joint)),
    };
    let full = Profile { name: "full".into(), cskv: None };
    vec![full, cskv("lossless", 1.0, 16, 4, 64), cskv("fifth", 0.2, 16, 4, 64), cskv("fifth-4", 0.2, 4, 0, 100)]
}

struct Model {
    checkpoint: &'static Checkpoint,
    decoder: Decoder<'static>,
    ready: Vec<ReadyProfile>,
}

fn model(name: &str) -> Model {
    let checkpoint: &'static Checkpoint = Box::leak(Box::new(Checkpoint::open(&folder(name)).unwrap()));
    let config = &checkpoint.config;
    let mut decoder = Decoder::new(config, checkpoint.weights(LoadDtype::F32), POSITIONS, 64);
    let texts: Vec<Vec<TokenId>> = (0..4).map(|i| tokens(300, 100 + i, config.vocab)).collect();
    let mut moments = Moments::new(config, 4);
    calibrate::collect(&mut decoder, &Cpu::new(1), &texts, &mut moments, |_| ()).unwrap();
    let artifact = {
        let sources = calibrate::Sources::closed();
        calibrate::artifact(&moments, config, Fingerprint([0; 32]), &profiles(), &sources, None).unwrap().artifact
    };
    let ready = profiles()
        .iter()
        .map(|p| ReadyProfile {
            layout: PageLayout::new(config, ExactType::F32, p, None),
            compression: if p.cskv.is_some() { artifact.layers(p).unwrap() } else { vec![] },
        })
        .collect();
    Model { checkpoint, decoder, ready }
}

pub(crate) fn tokens(n: usize, seed: u64, vocab: usize) -> Vec<TokenId> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x % vocab.min(250) as u64) as TokenId
        })
        .collect()
}

pub(crate) fn mean(blocks: &[Block]) -> f64 {
    blocks.iter().map(|b| b.sum).sum::<f64>() / blocks.iter().map(|b| f64::from(b.n)).sum::<f64>()
}

#[test]
fn the_exact_cache_agrees_with_itself_and_a_lossless_one_almost() {
    let Model { mut decoder, ready, .. } = model("llama3");
    let ops = Cpu::new(2);
    let sequence = tokens(700, 9, 256);
    let mut said = vec![Said::default(); 4];
    let mut machine =
        Machine { decoder: &mut decoder, ops: &ops, profiles: &ready, names: &["full", "one", "two", "three"], adapter: None };
    force(&mut machine, (0, &[0, 1, 2, 3]), &sequence, 200, &mut said).unwrap();
    for s in &said {
        assert_eq!(s.surprise.iter().map(|b| b.n).sum::<u32>(), 499, "tokens 201 to 699 are scored");
        assert_eq!(s.surprise.len(), 8);
    }
    assert_eq!(mean(&said[0].divergence), 0.0);
    assert_eq!(mean(&said[0].excess), 0.0);
    assert_eq!(mean(&said[0].agreement), 1.0);
    assert!(said.iter().all(|s| s.divergence.iter().all(|b| b.sum >= 0.0)));
    let [_, lossless, fifth, four] = [0, 1, 2, 3].map(|i| mean(&said[i].divergence));
    assert!(lossless < 1e-5 && mean(&said[1].agreement) > 0.99, "{lossless}");
    assert!(fifth > 100.0 * lossless && four > 100.0 * lossless, "a fifth of the channels costs something: {fifth}, {four}");
}

#[test]
fn forced_text_reads_what_decoding_reads() {
    // The engine's own answer, forced token by token, must look to the model as it did when it was said.
    for name in ["llama3", "qwen3"] {
        let Model { checkpoint, mut decoder, ready } = model(name);
        let prompts: Vec<Vec<TokenId>> = [1, 63, 130, 200].iter().map(|&n| tokens(n, n as u64, checkpoint.config.vocab)).collect();
        let engine_decoder = Decoder::new(&checkpoint.config, checkpoint.weights(LoadDtype::F32), POSITIONS, 64);
        let arena_bytes = ready[0].layout.sizes().exact * 64;
        let (engine, thread) = start(Parts {
            scheduler: scheduler::Config {
                max_num_seqs: 4,
                max_num_batched_tokens: 128,
                max_queued_requests: 64,
                max_queued_tokens: 1 << 20,
                layers: checkpoint.config.layers as u32,
                max_model_len: POSITIONS as u32,
                arena_bytes,
                profiles: ready.iter().map(|r| ProfileSizes::of(&r.layout)).collect(),
                prefix_caching: false,
                hash_secret: [7; 32],
                model_digest: [1; 32],
            },
            runner: Runner::Host(Box::new(Host {
                arena: Arena::new(arena_bytes).unwrap(),
                decoder: engine_decoder,
                profiles: ready.clone(),
                ops: Box::new(Cpu::new(2)),
            })),
            emit: Box::new(|_| ()),
        })
        .unwrap();
        for (profile, prompt) in (0..4).flat_map(|p| prompts.iter().map(move |prompt| (p, prompt))) {
            // Sampled, so that it does not fall into a loop.
            let sampling = Sampling { temperature: 1.0, seed: 5, ..Sampling::greedy() };
            let request = GenerateRequest { sampling, logprobs: Some(0), ..crate::engine::request(prompt, 260, profile) };
            let mut stream = engine.submit(request).unwrap();
            let (mut sequence, mut logprobs) = (prompt.clone(), vec![]);
            while let Event::Token { id, logprob } = crate::engine::event_of(&mut stream) {
                sequence.push(id);
                logprobs.push(f64::from(logprob.unwrap().logprob));
            }
            assert_eq!(logprobs.len(), 260);
            let mut said = [Said::default()];
            let ops = Cpu::new(2);
            let mut machine =
                Machine { decoder: &mut decoder, ops: &ops, profiles: &ready, names: &["full", "one", "two", "three"], adapter: None };
            force(&mut machine, (0, &[usize::from(profile)]), &sequence, prompt.len(), &mut said).unwrap();
            // The first token follows from the prefill and is not scored.
            for (block, engine) in said[0].surprise.iter().zip(logprobs[1..].chunks(64)) {
                let (forced, engine) = (block.sum, -engine.iter().sum::<f64>());
                assert!((forced - engine).abs() < 1e-3, "{name} profile {profile} prompt {}: {forced} {engine}", prompt.len());
            }
        }
        engine.stop();
        thread.join().unwrap().unwrap();
    }
}

#[test]
fn what_cannot_be_forced_is_refused() {
    let Model { mut decoder, ready, .. } = model("llama2");
    let ops = Cpu::new(1);
    let mut machine =
        Machine { decoder: &mut decoder, ops: &ops, profiles: &ready, names: &["full", "one", "two", "three"], adapter: None };
    let mut said = vec![Said::default()];
    for (n, prompt) in [(10, 9), (10, 10), (10, 0), (1, 0)] {
        let got = force(&mut machine, (0, &[1]), &tokens(n, 1, 256), prompt, &mut said);
        assert!(matches!(got, Err(ForcedError::NothingToScore { .. })), "{n} {prompt}");
    }
    let got = force(&mut machine, (0, &[1]), &tokens(POSITIONS + 1, 1, 256), 10, &mut said);
    assert!(matches!(got, Err(ForcedError::TooLong { .. })));
    // And what is broken is told by the profile it broke under.
    let broken = Delta { norm: Some(vec![f32::NAN; machine.decoder.config().hidden]), ..Delta::new(machine.decoder.config().layers) };
    machine.adapter = Some(&broken);
    let got = force(&mut machine, (0, &[1]), &tokens(20, 1, 256), 10, &mut said).unwrap_err().to_string();
    assert!(got.starts_with("the model made numbers that are not finite under full at position 10; the adapter"), "{got}");
    assert_eq!(said, [Said::default()], "nothing is scored by half");
}

// ---------------------------------------------------------------- files of prompts

/// A file that goes away with it.
pub(crate) struct Scratch(pub(crate) PathBuf);

impl Scratch {
    pub(crate) fn new(name: &str, bytes: &[u8]) -> Scratch {
        let path = std::env::temp_dir().join(format!("strait-eval-{}-{name}", std::process::id()));
        std::fs::File::create(&path).unwrap().write_all(bytes).unwrap();
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn prompts_of_a_file_are_read_in_every_form() {
    let file = Scratch::new(
        "forms",
        br#"{"messages": [{"role": "user", "content": "a"}], "gold": "17", "task": "kv", "target": 512, "id": 1}
{"prompt": "b", "gold": "two words", "task": "kv", "target": 1024, "max_tokens": 3}

{"input": "c", "outputs": ["x", 7]}
"#,
    );
    let sheets = read_questions(&file.0, &[]).unwrap();
    let said: Vec<String> = sheets
        .iter()
        .flat_map(|s| {
            s.questions.iter().map(move |q| format!("{} {:?} {:?} {:?} {}", s.task, s.length, q.rule, q.references, q.max_tokens))
        })
        .collect();
    assert_eq!(
        said,
        [r#"kv Some(512) LastWord ["17"] 96"#, r#"kv Some(1024) Found ["two words"] 3"#, r#"prompts None Found ["x", "7"] 96"#]
    );
    assert_eq!(read_questions(&file.0, &[1024]).unwrap().len(), 1);
    // The golden prompts of the demo model, which have all its tasks.
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/demo_prompts.jsonl");
    let n: usize = read_questions(&golden, &[]).unwrap().iter().map(|s| s.questions.len()).sum();
    assert_eq!(n, 8);
    for (line, want) in [
        ("{", "line 1 is not JSON"),
        ("{}", "line 1 has neither \"messages\" nor \"prompt\""),
        (r#"{"prompt": ""}"#, "has a prompt that is neither"),
        (r#"{"messages": [{"content": "a"}]}"#, "has a prompt that is neither"),
        (r#"{"prompt": "a"}"#, "has neither a \"gold\" answer nor \"outputs\""),
        (r#"{"prompt": "a", "outputs": [[]]}"#, "has \"outputs\" that are not texts"),
        (r#"{"prompt": "a", "gold": "b", "max_tokens": 0}"#, "has a \"max_tokens\" that is no count"),
        (" ", "holds no text"),
    ] {
        let file = Scratch::new("bad", line.as_bytes());
        let error = read_questions(&file.0, &[]).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
    let error = read_questions(&file.0, &[64]).unwrap_err().to_string();
    assert!(error.contains("has no prompt whose \"target\" is one of --lengths"), "{error}");
}
