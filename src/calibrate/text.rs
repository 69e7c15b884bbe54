//! Calibration text that is built in: prose, code, dialogue, lists, tables, logs and letters, so that a model without an
//! artifact can be calibrated at start. Some is written by hand, the rest is made by a seeded generator.

use std::fmt::Write;
use std::sync::LazyLock;

/// Bytes that a token of common vocabularies stands for, at the most, on text like this.
const BYTES_PER_TOKEN: usize = 5;

/// Text of at least `n_tokens_hint` tokens under a common vocabulary, as far as there is so much (about 10,000 tokens).
///
/// Kinds of text alternate every few hundred bytes, so a short piece is as mixed as the whole. It ends at a line's end.
/// The same argument gives the same text.
pub fn calibration_text(n_tokens_hint: usize) -> &'static str {
    static TEXT: LazyLock<String> = LazyLock::new(whole);
    let want = n_tokens_hint.saturating_mul(BYTES_PER_TOKEN);
    match TEXT.as_bytes().get(want..).and_then(|rest| rest.iter().position(|&b| b == b'\n')) {
        Some(end) => &TEXT[..=want + end],
        None => &TEXT,
    }
}

/// Uniform draws from a seed (SplitMix64).
pub(super) struct Draw(u64);

impl Draw {
    pub(super) fn new(seed: u64) -> Self {
        Draw(seed)
    }

    /// Below `n`, which is positive and small beside 2^64.
    pub(super) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }

    /// In `[0, 1)`.
    pub(super) fn fraction(&mut self) -> f64 {
        self.below(1 << 53) as f64 / (1u64 << 53) as f64
    }

    pub(super) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    /// `n` different ones (all, where there are fewer), in random order.
    pub(super) fn sample(&mut self, from: &[&str], n: usize) -> Vec<String> {
        let mut pool = from.to_vec();
        (0..n.min(from.len())).map(|_| pool.swap_remove(self.below(pool.len())).to_owned()).collect()
    }
}

fn whole() -> String {
    let mut draw = Draw::new(0x5712_a17e);
    let mut text = String::new();
    for (round, prose) in PROSE.iter().enumerate() {
        let generated: [fn(&mut Draw) -> String; 12] =
            [dialogue, table, log, settings, arithmetic, letter, shopping, questions, ledger, function, record, verse];
        writeln!(text, "{prose}\n").expect(MEMORY);
        writeln!(text, "{}\n", CODE[round % CODE.len()]).expect(MEMORY);
        // Six of the twelve each round: two rounds show all of them.
        for make in generated.iter().skip(round % 2).step_by(2) {
            writeln!(text, "{}\n", make(&mut draw)).expect(MEMORY);
        }
    }
    text
}

const MEMORY: &str = "a string takes every byte";

const PROSE: [&str; 16] = [
    "The lighthouse keeper had a rule about fog: never trust the first hour of it. In the first hour the fog is thin and proud, and ships sail on as if it were \
     nothing. By the second it has found the channel and lain down in it. She would climb the stair with the lamp oil in one hand and the brass horn in the other, \
     and count the steps aloud, a hundred and twelve of them, because counting kept her from listening. When a ship did answer, three short notes from somewhere \
     below the cliff, she wrote the time in the book and nothing else. There were forty years of such times in the book, and no names.",
    "Yeast is a patient animal. Mix five hundred grams of flour with three hundred and forty of water, ten of salt and a knob of last week's dough, and leave it \
     alone. After an hour, fold it: wet hands, four sides, gently. Do this three times. Overnight in the cold the sour notes arrive and the dough learns to hold \
     its own shape. In the morning heat the oven, and an iron pot inside it, as hot as it will go; twenty minutes with the lid, twenty-five without. The loaf is \
     done when it sounds hollow. Wait before you cut it. Nobody waits.",
    "A cache is a bet about the future made with memory of the past. If the bet is right, work that was done once need not be done again; if it is wrong, space \
     was spent on something nobody asked for. The designer therefore has two questions. What will be asked again, and how do we know? And what may be forgotten, \
     in what order, when space runs out? The second question is the harder one, because forgetting is cheap today and expensive at an unknown later time. Most \
     policies answer it with recency, since what was wanted lately is the best evidence we have.",
    "In 1854 a physician drew a dot on a street map for every death from cholera in his district. The dots crowded around one water pump. He did not know about \
     bacteria, and neither did anybody else; the prevailing view blamed bad air. But the brewery workers, who drank beer, were spared, and a widow far away who \
     had the pump's water carried to her, because she liked its taste, was not. The handle was removed. It is often told as the story of a map, yet the map came \
     later: first came walking from door to door and asking what people drank.",
    "The defendant argues that the notice was late. The contract says that notice is given \"when it reaches the other party's place of business\", and the \
     courier's receipt shows delivery at 17:42 on the last permitted day, eighteen minutes before the office closed. That nobody opened the envelope until the \
     following Monday does not matter: the clause speaks of reaching a place, not of being read. The appeal is dismissed, with costs. Whether the clause was a \
     wise one is not for this court to say.",
    "Mitochondria have their own genes, few and circular, a souvenir of the time when they were free-living cells. Most of what they need is now made from genes in \
     the nucleus and carried in through two membranes by a machinery of its own. Between those membranes the cell stores energy as a difference of protons, about \
     a hundred and fifty millivolts across five nanometres: scaled up, the field of a lightning bolt. The enzyme that spends it is a rotor. It turns some hundred \
     times a second, and every turn makes three molecules of the fuel that everything else burns.",
    "Grandfather sold clocks and distrusted all of them. \"A clock that is wrong is right twice a day,\" the customers would say, pleased with themselves, and he \
     would answer that a clock five minutes slow is never right at all and far more useful. He set the one in the window by the noon train. When the railway \
     changed its timetable he kept to the old one for a month, out of loyalty, and the whole street was late to church. My grandmother, who wound them all on \
     Sundays, called it the only month in which they had an honest marriage.",
    "The morning market opens before the sun. Crates of aubergines and pale green figs come off the trucks, then the fish, then the flowers, always last, because \
     they bruise. Buyers walk with their hands behind their backs so as not to seem eager. A price is never said aloud: it is written with a finger on the other's \
     palm. By eight the best is gone, and the square belongs to people who want two tomatoes and a conversation. At one o'clock the hoses come out and the \
     pigeons take over the books.",
    "Der Zug nach Norden hielt an jeder Station, auch an denen, die es nicht mehr gab. Niemand stieg ein. Le contrôleur passait une fois par heure et demandait \
     les billets avec une politesse d'un autre siècle. \"No hay prisa\", dijo la mujer del asiento de enfrente, \"el mar no se va a ninguna parte.\" Era vero: il \
     mare non si muoveva, e neanche noi. Später, als das Licht ausging, erzählte jeder eine Geschichte in der Sprache, in der er träumte, und die anderen nickten.",
    "Abstract. We measure how the error of a low-rank approximation depends on the spectrum of the data rather than on its dimension. For matrices whose singular \
     values fall as a power law with exponent above one half, the relative error of rank r decreases polynomially, whatever the number of columns. We give a \
     bound that is tight up to a constant, an estimator of the exponent that needs a few hundred rows, and a test that tells when it must not be used. Experiments \
     on four public collections agree with the theory to within 3 %. Limits are discussed in section 6.",
    "To replace the filter, first switch the unit off and wait until the light stops blinking. Press both tabs and pull the drawer towards you. Hold a cloth under it: \
     some water will run out. Turn the old filter a quarter turn anticlockwise and lift it. Check that the rubber ring sits in its groove; a twisted ring is the \
     most frequent cause of leaks. Insert the new filter so that the arrow points up, turn it until it clicks, close the drawer and switch the unit on. If the \
     light shows red after a minute, see \"Troubleshooting\" on page 31.",
    "They came over the pass in the second week of snow, eleven riders and a mule that knew the way better than any of them. The youngest carried the letter. He had \
     been told three times not to read it and had read it twice, and it had made no sense, being only a list of birds: heron, two crows, a wren, heron again. At \
     the gate the steward broke the seal, went white, and counted on his fingers. \"Which bird was last?\" he asked. The boy said that he did not know, for he was \
     a good liar, and because he had begun to understand.",
    "Good evening. The council has approved the new bridge by nine votes to six, after a debate that lasted until midnight. Work begins in April and will take two \
     years; during that time buses 14 and 22 take the northern route. Opponents say that the cost, now put at 61 million, was 38 million when the plan was first \
     shown. In sport, the city's handball team lost its fourth match in a row. And the weather: rain in the west, clearing by noon, with a high of 17 degrees and a \
     light wind from the south.",
    "What is it to know a thing by heart? The pianist who stops to think which finger comes next has already stumbled. Memory of this kind lives in the doing, and \
     looking at it closely breaks it, as one loses the word one says forty times. Yet it was put there by looking closely, bar by bar, for weeks. Perhaps \
     attention is a scaffold: necessary while the wall is wet, and afterwards only in the way. But then who is playing, when nobody attends?",
    "Soil samples from the terrace show three layers. The lowest, 40 to 55 cm, is river gravel without finds. Above it lies a dark band rich in charcoal, with \
     fragments of coarse pottery, a bone needle and the seeds of barley and flax; two radiocarbon dates place it around 2300 before our era. The top layer has been \
     ploughed and mixes everything from medieval tile to bottle caps. No walls were met. The charcoal band continues to the east, under the road, and should be \
     followed there if the road is ever moved.",
    "\"You can't get there from here,\" said the old man, with evident satisfaction. The couple in the car looked at their map, which said otherwise. \"The bridge \
     went in the flood,\" he explained. \"Which flood?\" \"Eighty-seven.\" They drove on all the same, as people do, past the mill and the sign that said NO THROUGH \
     ROAD, and found the bridge, new and white, with a plaque. On the way back he was still on his bench. \"Told you,\" he called out. \"That's not the bridge I meant.\"",
];

const CODE: [&str; 8] = [
    "fn merge(a: &[u32], b: &[u32]) -> Vec<u32> {\n    let (mut i, mut j) = (0, 0);\n    let mut out = Vec::with_capacity(a.len() + b.len());\n    while i < a.len() && j < b.len() {\n        if a[i] <= b[j] {\n            out.push(a[i]);\n            i += 1;\n        } else {\n            out.push(b[j]);\n            j += 1;\n        }\n    }\n    out.extend_from_slice(&a[i..]);\n    out.extend_from_slice(&b[j..]);\n    out\n}",
    "def word_counts(path, limit=10):\n    \"\"\"The most frequent words of a text file, with their counts.\"\"\"\n    counts = {}\n    with open(path, encoding='utf-8') as f:\n        for line in f:\n            for word in line.lower().split():\n                word = word.strip('.,;:!?\"()')\n                if word:\n                    counts[word] = counts.get(word, 0) + 1\n    return sorted(counts.items(), key=lambda item: -item[1])[:limit]\n\nif __name__ == '__main__':\n    import sys\n    for word, n in word_counts(sys.argv[1]):\n        print(f'{n:6d} {word}')",
    "SELECT c.name, COUNT(o.id) AS orders, SUM(o.total) AS revenue\nFROM customers AS c\nLEFT JOIN orders AS o ON o.customer_id = c.id AND o.placed_at >= '2023-01-01'\nWHERE c.country IN ('NL', 'BE', 'LU')\nGROUP BY c.name\nHAVING SUM(o.total) > 1000\nORDER BY revenue DESC\nLIMIT 25;",
    "#include <stdio.h>\n#include <stdlib.h>\n\nstruct node { int key; struct node *left, *right; };\n\nstatic int depth(const struct node *n) {\n    if (n == NULL) return 0;\n    int l = depth(n->left), r = depth(n->right);\n    return 1 + (l > r ? l : r);\n}\n\nint main(void) {\n    struct node leaf = { 3, NULL, NULL }, root = { 5, &leaf, NULL };\n    printf(\"depth %d\\n\", depth(&root));\n    return EXIT_SUCCESS;\n}",
    "{\n  \"name\": \"harbour-gauge\",\n  \"version\": \"2.4.1\",\n  \"station\": { \"id\": 7731, \"lat\": 53.5461, \"lon\": 9.9662 },\n  \"readings\": [\n    { \"at\": \"2024-02-11T06:00:00Z\", \"level_cm\": 512, \"ok\": true },\n    { \"at\": \"2024-02-11T06:10:00Z\", \"level_cm\": 518, \"ok\": true },\n    { \"at\": \"2024-02-11T06:20:00Z\", \"level_cm\": null, \"ok\": false }\n  ],\n  \"contact\": null\n}",
    "export async function fetchPages(url: string, max = 5): Promise<Item[]> {\n  const items: Item[] = [];\n  let next: string | null = url;\n  for (let page = 0; next && page < max; page++) {\n    const reply = await fetch(next, { headers: { accept: 'application/json' } });\n    if (!reply.ok) throw new Error(`HTTP ${reply.status} from ${next}`);\n    const body = await reply.json();\n    items.push(...body.items);\n    next = body.links?.next ?? null;\n  }\n  return items;\n}",
    "#!/bin/sh\nset -eu\nfor f in \"$HOME\"/photos/*.jpg; do\n    day=$(date -r \"$f\" +%Y-%m-%d)\n    mkdir -p \"/backup/$day\"\n    cp -n \"$f\" \"/backup/$day/\" && echo \"copied $(basename \"$f\") to $day\"\ndone\ndu -sh /backup | cut -f1",
    "<!doctype html>\n<html lang=\"en\">\n  <head><title>Opening hours</title></head>\n  <body>\n    <h1>Opening hours</h1>\n    <table class=\"hours\">\n      <tr><td>Monday to Friday</td><td>08:00-18:30</td></tr>\n      <tr><td>Saturday</td><td>09:00-13:00</td></tr>\n    </table>\n    <p>Closed on <em>public holidays</em>. <a href=\"/contact\">Write to us</a>.</p>\n  </body>\n</html>",
];

const PEOPLE: [&str; 14] =
    ["Amara", "Bruno", "Chen", "Dalia", "Emil", "Farah", "Goran", "Hana", "Ivo", "Jun", "Katya", "Luis", "Mirela", "Noor"];
const THINGS: [&str; 20] = [
    "ladder", "lamp", "notebook", "engine", "kettle", "window", "ticket", "camera", "blanket", "compass", "harness", "printer", "sensor",
    "valve", "curtain", "basket", "bracket", "cable", "mirror", "drum",
];
const PLACES: [&str; 12] = [
    "the station",
    "the archive",
    "the north dock",
    "room 214",
    "the greenhouse",
    "the workshop",
    "the old mill",
    "the clinic",
    "the roof",
    "the cellar",
    "the library",
    "the depot",
];
const VERBS: [&str; 10] = ["repair", "replace", "count", "move", "label", "borrow", "inspect", "sell", "return", "photograph"];
const MONTHS: [&str; 12] =
    ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"];

fn dialogue(d: &mut Draw) -> String {
    let people = d.sample(&PEOPLE, 2);
    let (thing, place) = (*d.pick(&THINGS), *d.pick(&PLACES));
    let ask = [
        format!("Did you {} the {thing}?", d.pick(&VERBS)),
        format!("Where did we leave the {thing}?"),
        format!("Who was the last one at {place}?"),
        format!("How many of the {thing}s are left?"),
    ];
    let reply = [
        format!("It should be at {place}, next to the {}.", d.pick(&THINGS)),
        format!("I asked {} yesterday, and the answer was {}.", d.pick(&PEOPLE), d.below(60)),
        "I have no idea, to be honest. Let me look it up and call you back.".to_owned(),
        format!("Not yet. We wait for {} until {}:{:02}.", d.pick(&PEOPLE), 7 + d.below(12), d.below(60)),
        format!("Yes, twice. The second time it took {} minutes.", 3 + d.below(90)),
    ];
    let mut out = String::new();
    for _ in 0..3 {
        writeln!(out, "{}: {}\n{}: {}", people[0], d.pick(&ask), people[1], d.pick(&reply)).expect(MEMORY);
    }
    write!(out, "{}: Fine. Then we meet at {place}.", people[0]).expect(MEMORY);
    out
}

fn table(d: &mut Draw) -> String {
    let mut out = String::from("| item | stock | price | last order |\n|---|---|---|---|");
    for thing in d.sample(&THINGS, 7) {
        write!(
            out,
            "\n| {thing} | {} | {}.{:02} | {} {} |",
            d.below(900),
            1 + d.below(400),
            d.below(100),
            1 + d.below(28),
            d.pick(&MONTHS)
        )
        .expect(MEMORY);
    }
    out
}

fn log(d: &mut Draw) -> String {
    let mut at = d.below(80_000);
    let mut out = String::from("service started, pid 4127");
    for _ in 0..8 {
        at += d.below(240);
        let (h, m, s) = (at / 3600 % 24, at / 60 % 60, at % 60);
        let level = *d.pick(&["INFO", "INFO", "INFO", "WARN", "ERROR", "DEBUG"]);
        let what = [
            format!(
                "request id={:08x} path=/v2/items/{} status={} ms={}",
                d.below(1 << 31),
                d.below(9999),
                d.pick(&[200, 200, 204, 404, 503]),
                d.below(900)
            ),
            format!("worker {} took job {} from queue \"{}\"", d.below(16), d.below(100_000), d.pick(&THINGS)),
            format!(
                "connection from 10.0.{}.{}:{} closed after {} bytes",
                d.below(256),
                d.below(256),
                1024 + d.below(60_000),
                d.below(1 << 20)
            ),
            format!("retry {} of 5 in {} ms: timed out waiting for {}", 1 + d.below(5), 100 << d.below(5), d.pick(&PLACES)),
        ];
        write!(out, "\n2024-{:02}-{:02}T{h:02}:{m:02}:{s:02}Z {level} {}", 1 + d.below(12), 1 + d.below(28), d.pick(&what)).expect(MEMORY);
    }
    out
}

fn settings(d: &mut Draw) -> String {
    let mut out = String::new();
    for section in d.sample(&THINGS, 3) {
        writeln!(out, "[{section}]").expect(MEMORY);
        for key in d.sample(&["timeout_s", "retries", "path", "enabled", "ratio", "owner", "level"], 4) {
            let value = match key.as_str() {
                "path" => format!("\"/srv/{}/{}\"", d.pick(&THINGS), d.below(100)),
                "enabled" => d.pick(&["true", "false"]).to_string(),
                "ratio" => format!("0.{:03}", d.below(1000)),
                "owner" => format!("\"{}\"", d.pick(&PEOPLE).to_lowercase()),
                _ => d.below(500).to_string(),
            };
            writeln!(out, "{key} = {value}").expect(MEMORY);
        }
    }
    out.truncate(out.trim_end().len());
    out
}

fn arithmetic(d: &mut Draw) -> String {
    let mut out = String::from("Worked examples:");
    for i in 1..=6 {
        let (a, b) = (2 + d.below(90), 2 + d.below(40));
        let line = match d.below(4) {
            0 => format!("{a} + {b} = {}", a + b),
            1 => format!("{a} * {b} = {}", a * b),
            2 => format!("{} / {b} = {a}, because {a} times {b} is {}", a * b, a * b),
            _ => format!("if x - {b} = {a}, then x = {}", a + b),
        };
        write!(out, "\n({i}) {line}.").expect(MEMORY);
    }
    out
}

fn letter(d: &mut Draw) -> String {
    let people = d.sample(&PEOPLE, 3);
    let (thing, place, month) = (*d.pick(&THINGS), *d.pick(&PLACES), *d.pick(&MONTHS));
    format!(
        "Subject: {thing} for {place}\n\nDear {},\n\nthank you for your message of {} {month}. We can {} the {thing} by the {}th, provided that {} \
         signs the form before then. The price stays at {} euros, delivery included. Please tell us whether somebody will be at {place} between {} and {} \
         o'clock; otherwise we leave it with the neighbours, as last time.\n\nKind regards,\n{}",
        people[0],
        1 + d.below(28),
        d.pick(&VERBS),
        10 + d.below(18),
        people[1],
        20 + d.below(3000),
        8 + d.below(4),
        13 + d.below(6),
        people[2]
    )
}

fn shopping(d: &mut Draw) -> String {
    let mut out = format!("To do before {} {}:", 1 + d.below(28), d.pick(&MONTHS));
    for (i, thing) in d.sample(&THINGS, 6).iter().enumerate() {
        write!(out, "\n{}. {} the {thing} at {} ({} pieces)", i + 1, d.pick(&VERBS), d.pick(&PLACES), 1 + d.below(40)).expect(MEMORY);
    }
    out
}

fn questions(d: &mut Draw) -> String {
    const FACTS: [(&str, &str); 10] = [
        ("What is the boiling point of water at sea level?", "100 degrees Celsius, or 212 degrees Fahrenheit."),
        ("Which planet is the largest?", "Jupiter. It has more than twice the mass of all the others together."),
        ("Who wrote the play about the prince of Denmark?", "William Shakespeare, around the year 1600."),
        ("How many sides does a hexagon have?", "Six."),
        ("What is the chemical symbol of iron?", "Fe, from the Latin word ferrum."),
        ("Why is the sky blue?", "Because air scatters short wavelengths of sunlight more strongly than long ones."),
        ("In which country does the Danube end?", "In Romania, where its delta meets the Black Sea; a part of the delta is in Ukraine."),
        ("What does a barometer measure?", "The pressure of the air."),
        ("What is the square root of 144?", "12, and -12 when both roots are asked for."),
        ("Which language has the word 'sisu'?", "Finnish. It means something like stubborn courage."),
    ];
    let first = d.below(FACTS.len());
    (0..4).map(|i| FACTS[(first + i * 3) % FACTS.len()]).map(|(q, a)| format!("Q: {q}\nA: {a}")).collect::<Vec<_>>().join("\n")
}

fn ledger(d: &mut Draw) -> String {
    let mut out = String::from("date,account,amount,reference");
    for _ in 0..9 {
        let reference = format!("{}-{:05}", d.pick(&["INV", "PAY", "REF"]), d.below(100_000));
        write!(
            out,
            "\n2024-{:02}-{:02},{},{}{}.{:02},{reference}",
            1 + d.below(12),
            1 + d.below(28),
            d.pick(&THINGS),
            d.pick(&["", "-"]),
            d.below(5000),
            d.below(100)
        )
        .expect(MEMORY);
    }
    out
}

fn function(d: &mut Draw) -> String {
    let (a, b) = (*d.pick(&VERBS), *d.pick(&THINGS));
    let (limit, step) = (10 + d.below(500), 1 + d.below(9));
    let name = d.pick(&PEOPLE).to_lowercase();
    format!(
        "# called by {name} every {limit} seconds\ndef {a}_{b}s(items, limit={limit}):\n    done = 0\n    for i, item in enumerate(items):\n        if item.kind != \"{b}\" or i % {step}:\n            continue\n        \
         item.{a}(force=done > limit)\n        done += 1\n    return done\n\nassert {a}_{b}s([]) == 0"
    )
}

fn record(d: &mut Draw) -> String {
    let mut out = String::from("Remember these values; you will be asked for one of them.");
    let things = d.sample(&THINGS, 8);
    let values: Vec<usize> = things.iter().map(|_| 10_000 + d.below(90_000)).collect();
    for (thing, value) in things.iter().zip(&values) {
        write!(out, "\nThe code of the {thing} is {value}.").expect(MEMORY);
    }
    let i = d.below(things.len());
    write!(out, "\nWhat is the code of the {}? It is {}.", things[i], values[i]).expect(MEMORY);
    out
}

fn verse(d: &mut Draw) -> String {
    let [a, b, c] = [(); 3].map(|()| *d.pick(&THINGS));
    let (place, month, who) = (*d.pick(&PLACES), *d.pick(&MONTHS), *d.pick(&PEOPLE));
    format!(
        "A {a}, a {b}, and a {c} in the rain,\n{who} has lost them, and found them again;\nunder {place}, in the last days of {month},\nthings that are lost are the things we remember."
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_long_mixed_and_cut_at_a_line() {
        let all = calibration_text(usize::MAX);
        assert!((40_000..64_000).contains(&all.len()), "{} bytes", all.len());
        assert_eq!(all, whole(), "it is the same each time");
        for n in [1, 100, 1000, 4000] {
            let part = calibration_text(n);
            assert!(all.starts_with(part) && part.ends_with('\n') && part.len() >= n * BYTES_PER_TOKEN);
        }
        // A few thousand tokens hold every kind already.
        let part = calibration_text(2000);
        for mark in ["lighthouse", "fn merge", "| item |", "INFO", "Worked examples", "Dear ", "Q: ", "date,account", "The code of the"] {
            assert!(part.contains(mark), "{mark}");
        }
    }
}
