//! The canned conversations of the topics task: thirty topics, four sides to each, and the words to talk about them.

use super::words::Draw;

/// A topic and four of its sides.
const TOPICS: [(&str, [&str; 4]); 30] = [
    ("the history of bridges", ["stone arches", "iron trusses", "suspension cables", "river crossings"]),
    ("growing tomatoes at home", ["soil and compost", "watering", "sunlight", "late blight"]),
    ("learning to play the piano", ["daily practice", "reading music", "posture", "choosing a teacher"]),
    ("the ethics of zoos", ["animal welfare", "education", "breeding programmes", "enclosure design"]),
    ("how vaccines work", ["antibodies", "boosters", "trials", "herd immunity"]),
    ("planning a bicycle tour", ["route maps", "luggage", "spare parts", "daily distance"]),
    ("the economics of recycling", ["collection", "sorting", "market prices", "landfill costs"]),
    ("ancient Roman engineering", ["aqueducts", "concrete", "roads", "heated floors"]),
    ("the physics of sailing", ["lift", "keels", "wind angles", "wave drag"]),
    ("writing a mystery novel", ["clues", "suspects", "pacing", "the ending"]),
    ("home coffee roasting", ["green beans", "first crack", "cooling", "storage"]),
    ("urban beekeeping", ["hives", "forage", "swarms", "neighbours"]),
    ("the causes of inflation", ["money supply", "wages", "expectations", "energy prices"]),
    ("photographing the night sky", ["exposure", "tracking mounts", "light pollution", "stacking"]),
    ("the psychology of habits", ["cues", "rewards", "streaks", "relapse"]),
    ("designing board games", ["rules", "balance", "theme", "playtesting"]),
    ("the migration of birds", ["magnetic sense", "stopovers", "flocks", "changing seasons"]),
    ("restoring old furniture", ["stripping varnish", "glue", "veneer", "wax"]),
    ("public speaking for beginners", ["breathing", "structure", "eye contact", "questions"]),
    ("the future of nuclear energy", ["small reactors", "waste", "cost", "safety"]),
    ("training for a marathon", ["long runs", "rest days", "shoes", "nutrition"]),
    ("the art of bread baking", ["sourdough", "kneading", "oven steam", "flour"]),
    ("how compilers optimise code", ["inlining", "register allocation", "loops", "profiling"]),
    ("the culture of tea ceremonies", ["utensils", "etiquette", "seasons", "silence"]),
    ("protecting coral reefs", ["bleaching", "fishing limits", "tourism", "larval seeding"]),
    ("raising bilingual children", ["consistency", "school", "reading aloud", "mixing languages"]),
    ("the invention of printing", ["movable type", "paper", "ink", "literacy"]),
    ("choosing a first telescope", ["aperture", "mounts", "eyepieces", "portability"]),
    ("the chemistry of soap", ["lye", "oils", "curing", "hard water"]),
    ("volunteering in a hospital", ["training days", "privacy", "night shifts", "listening"]),
];

/// What the user asks about a side, and what the assistant answers.
const TURNS: [(&str, &str); 8] = [
    ("What is the point of {} here?", "Everything else depends on it. Get {} right and most later problems never appear."),
    (
        "What do beginners get wrong about {}?",
        "They hurry. With {} it pays to start small, watch what happens, and change one thing at a time.",
    ),
    (
        "What has changed about {} over the years?",
        "More than most people think. What was once said about {} came from custom; today there are measurements to go by.",
    ),
    (
        "Who should I ask about {}?",
        "Someone who has failed at it before. People with long experience of {} know its limits, and that is the useful part.",
    ),
    ("Must I spend much on {}?", "Not at all. The cheap way to approach {} takes longer, and for many people that is a fair exchange."),
    (
        "Can you give me an example of {}?",
        "Certainly. Imagine two neighbours who treat {} differently for a year and then compare their notes.",
    ),
    (
        "What is the biggest risk with {}?",
        "Overconfidence. Most accounts of trouble with {} begin with somebody who was sure of the result.",
    ),
    (
        "Where can I read more about {}?",
        "Any good library has a shelf on it. Begin with a short introduction to {}, and follow its references.",
    ),
];

/// Most turns that a conversation about one topic can have.
const TURNS_MOST: usize = 4 * TURNS.len();

/// Conversations on different topics with `turns` turns in all, beyond the opening ones: the topics in order, and the record.
/// Three turns to a topic at first; once all topics are in, conversations grow. `None` where there are not so many turns.
pub(super) fn conversations(draw: &mut Draw, turns: usize) -> Option<(Vec<&'static str>, String)> {
    let n = turns.div_ceil(3).clamp(2, TOPICS.len());
    if turns > n * TURNS_MOST {
        return None;
    }
    let chosen = draw.distinct(TOPICS.len(), n);
    let mut record = String::new();
    for (i, &topic) in chosen.iter().enumerate() {
        let (name, sides) = TOPICS[topic];
        record += &format!("USER: I would like to discuss the topic of {name}.\nASSISTANT: Sure! What would you like to know about it?\n");
        // The first conversations take what does not divide evenly.
        let own = turns / n + usize::from(i < turns % n);
        for turn in draw.distinct(TURNS_MOST, own) {
            let (question, answer) = TURNS[turn / 4];
            let side = sides[turn % 4];
            record += &format!("USER: {}\nASSISTANT: {}\n", question.replace("{}", side), answer.replace("{}", side));
        }
    }
    Some((chosen.iter().map(|&i| TOPICS[i].0).collect(), record))
}
