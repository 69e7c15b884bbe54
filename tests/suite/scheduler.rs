//! The scheduler's policy, as transcripts: what each step computes, and what became of it.
//!
//! A row prints as `sequence profile positions [layers] sealed=pages exact=pages moves`; outcomes follow after `=`. Profile 0 is
//! `full`; profile 1 keeps a window of 64 and 4 sinks. Four layers, pages of 4096 (exact), 512 (sealed), 256 (sinks) and 2048
//! (workspace) bytes.

use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use expect_test::{Expect, expect};

use strait::ids::{AdapterGeneration, ProfileIndex, SeqId, TokenId};
use strait::kv::layout::PageSizes;
use strait::request::{Failure, GenerateRequest, Sampling, Timings};
use strait::scheduler::{Config, ConfigError, Outcome, ProfileSizes, Refused, RowResult, Scheduler, SealedSplit};
use strait::step::{Logits, StepPlan};
use strait::telemetry::Branch;

const SLAB: u64 = 4096;
/// What the model always says; no stop token.
const WORD: TokenId = 7;
const STOP: TokenId = 2;

pub(crate) fn config(slabs: u64) -> Config {
    let full = ProfileSizes { sizes: PageSizes { exact: SLAB, ..PageSizes::default() }, ..ProfileSizes::default() };
    let compressed = ProfileSizes {
        sizes: PageSizes { exact: SLAB, sealed: 512, sinks: 256, workspace: 2048 },
        window: 64,
        sinks: 4,
        compressed: true,
        split: SealedSplit { keys: 200, values: 200, metadata: 112 },
    };
    Config {
        max_num_seqs: 8,
        max_num_batched_tokens: 128,
        max_queued_requests: 16,
        max_queued_tokens: 10_000,
        layers: 4,
        max_model_len: 4000,
        arena_bytes: slabs * SLAB,
        profiles: vec![full, compressed],
        prefix_caching: true,
        hash_secret: [3; 32],
        model_digest: [5; 32],
    }
}

/// A request with a prompt of its own, told apart by `document`.
fn request(profile: u8, document: u32, prompt: u32, max_new_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        prompt: (0..prompt).map(|i| 1000 * document + 10 + i % 700).collect(),
        max_new_tokens,
        min_new_tokens: 0,
        stop_tokens: Arc::from([STOP]),
        sampling: Sampling::greedy(),
        logprobs: None,
        prompt_logprobs: None,
        profile: ProfileIndex(profile),
        adapter: AdapterGeneration(0),
        priority: 0,
        cache_salt: 0,
        queue_timeout: Duration::MAX,
    }
}

struct Script {
    scheduler: Scheduler,
    plan: StepPlan,
    text: String,
    next: u64,
    now: Duration,
}

impl Script {
    fn new(config: Config) -> Self {
        let scheduler = Scheduler::new(config).expect("a sound configuration");
        Script { scheduler, plan: StepPlan::default(), text: String::new(), next: 0, now: Duration::ZERO }
    }

    fn enqueue(&mut self, request: GenerateRequest) -> SeqId {
        let seq = SeqId(self.next);
        self.next += 1;
        self.scheduler.enqueue(seq, request, self.now).expect("it fits");
        seq
    }

    fn plan(&mut self) {
        let mut out = Vec::new();
        self.now += Duration::from_secs(1);
        self.scheduler.plan(self.now, &mut self.plan, &mut out);
        self.tell(&out);
        write!(self.text, "{}", self.plan).expect("strings take everything");
        self.check();
    }

    /// Every wanted token is `word`.
    fn commit(&mut self, word: TokenId) {
        let results = self.plan.rows.iter().map(|row| match row.logits {
            Logits::None => RowResult::Nothing,
            Logits::Last | Logits::All => RowResult::Token(word),
        });
        self.commit_results(&results.collect::<Vec<_>>());
    }

    fn commit_results(&mut self, results: &[RowResult]) {
        let mut out = Vec::new();
        self.scheduler.commit(&self.plan, results, self.now, &mut out);
        self.tell(&out);
        self.text += "--\n";
        self.check();
    }

    fn steps(&mut self, n: usize) -> &mut Self {
        for _ in 0..n {
            self.plan();
            if self.plan.rows.is_empty() {
                break;
            }
            self.commit(WORD);
        }
        self
    }

    /// Steps until something was said.
    fn steps_until(&mut self, at_most: usize, what: &str) {
        for _ in 0..at_most {
            if self.text.contains(what) {
                return;
            }
            self.steps(1);
        }
        panic!("{at_most} steps without {what:?}:\n{}", self.text);
    }

    /// Steps that are not worth a line.
    fn skip(&mut self, n: usize) -> &mut Self {
        let before = self.text.len();
        self.steps(n);
        self.text.truncate(before);
        writeln!(self.text, "... {n} steps").expect("strings take everything");
        self
    }

    fn tell(&mut self, out: &[Outcome]) {
        for outcome in out {
            let line = match outcome {
                Outcome::Started { seq, queued, cached_tokens, .. } => format!("{seq:?} starts after {queued:?}, {cached_tokens} cached"),
                Outcome::Token { seq, id: WORD, .. } => format!("{seq:?} says one"),
                Outcome::Token { seq, id, .. } => format!("{seq:?} says {id}"),
                Outcome::Preempted { seq } => format!("{seq:?} preempted"),
                Outcome::Done { seq, reason, ended } => {
                    let (usage, cache) = (ended.usage, ended.usage.cache);
                    format!(
                        "{seq:?} {reason:?}: {}+{} tokens, {} cached; {} sealed, {} exact, {} bytes",
                        usage.prompt_tokens,
                        usage.completion_tokens,
                        usage.cached_tokens,
                        cache.sealed_tokens,
                        cache.window_tokens,
                        cache.bytes
                    )
                }
                Outcome::Failed { seq, failure, ended } => format!("{seq:?} {failure:?} after {} tokens", ended.usage.completion_tokens),
            };
            writeln!(self.text, "= {line}").expect("strings take everything");
        }
    }

    fn held(&self) -> u64 {
        self.scheduler.pool().bytes().held
    }

    fn check(&self) {
        self.scheduler.check().unwrap_or_else(|fault| panic!("{fault}\n{}", self.text));
    }

    fn finish(&mut self, want: Expect) {
        want.assert_eq(&std::mem::take(&mut self.text));
    }
}

#[test]
fn a_short_chat() {
    let mut s = Script::new(config(16));
    s.enqueue(request(0, 0, 10, 3));
    s.steps(4).finish(expect![[r#"
        = s0 starts after 1s, 0 cached
        s0 p0 0..10 sealed=0 exact=1 sample
        = s0 says one
        --
        s0 p0 10..11 sealed=0 exact=1 sample
        = s0 says one
        --
        s0 p0 11..12 sealed=0 exact=1 sample
        = s0 says one
        = s0 Length: 10+3 tokens, 0 cached; 0 sealed, 12 exact, 4096 bytes
        --
    "#]]);
}

#[test]
fn a_stop_token_is_the_last_of_the_stream() {
    let mut s = Script::new(config(16));
    s.enqueue(GenerateRequest { min_new_tokens: 2, ..request(0, 0, 10, 9) });
    for word in [STOP, WORD, STOP] {
        s.plan();
        s.commit(word);
    }
    s.finish(expect![[r#"
        = s0 starts after 1s, 0 cached
        s0 p0 0..10 sealed=0 exact=1 sample
        = s0 says 2
        --
        s0 p0 10..11 sealed=0 exact=1 sample
        = s0 says one
        --
        s0 p0 11..12 sealed=0 exact=1 sample
        = s0 says 2
        = s0 Stop: 10+3 tokens, 0 cached; 0 sealed, 12 exact, 4096 bytes
        --
    "#]]);
}

#[test]
fn a_long_full_prompt_in_chunks_beside_decodes() {
    let mut s = Script::new(config(16));
    s.enqueue(request(0, 0, 60, 9));
    s.enqueue(request(0, 1, 300, 2));
    s.steps(6).finish(expect![[r#"
        = s0 starts after 1s, 0 cached
        = s1 starts after 1s, 0 cached
        s0 p0 0..60 sealed=0 exact=1 sample
        s1 p0 0..64 sealed=0 exact=1
        = s0 says one
        --
        s0 p0 60..61 sealed=0 exact=1 sample
        s1 p0 64..128 sealed=0 exact=2
        = s0 says one
        --
        s0 p0 61..62 sealed=0 exact=1 sample
        s1 p0 128..192 sealed=0 exact=3
        = s0 says one
        --
        s0 p0 62..63 sealed=0 exact=1 sample
        s1 p0 192..300 sealed=0 exact=5 sample
        = s0 says one
        = s1 says one
        --
        s0 p0 63..64 sealed=0 exact=1 sample
        s1 p0 300..301 sealed=0 exact=5 sample
        = s0 says one
        = s1 says one
        = s1 Length: 300+2 tokens, 0 cached; 0 sealed, 301 exact, 20480 bytes
        --
        s0 p0 64..65 sealed=0 exact=2 sample
        = s0 says one
        --
    "#]]);
}

#[test]
fn a_long_compressed_prompt_goes_layer_by_layer() {
    let mut s = Script::new(config(16));
    s.enqueue(request(1, 0, 200, 2));
    s.steps(8).finish(expect![[r#"
        = s0 starts after 1s, 0 cached
        s0 p1 0..200 layers 0..1 sealed=0 exact=4 sinks seal->@128 seal->@136 keep(64) keep(8)
        s0 p1 0..200 layers 1..2 sealed=0 exact=4 sinks seal->@128 seal->@136 keep(64) keep(8)
        s0 p1 0..64 layers 2..3 sealed=0 exact=1
        --
        s0 p1 64..200 layers 2..3 sealed=0 exact=4 sinks seal->@128 seal->@136 keep(64) keep(8)
        s0 p1 0..200 layers 3..4 sealed=0 exact=4 sinks seal->@128 seal->@136 keep(64) keep(8) sample
        = s0 says one
        --
        s0 p1 200..201 sealed=2 exact=2 sample
        = s0 says one
        = s0 Length: 200+2 tokens, 0 cached; 128 sealed, 77 exact, 9472 bytes
        --
    "#]]);
    let mut s = Script::new(config(16));
    s.enqueue(request(0, 9, 10, 99));
    s.enqueue(request(1, 0, 300, 2));
    s.skip(2).steps(3).finish(expect![[r#"
        ... 2 steps
        s0 p0 11..12 sealed=0 exact=1 sample
        s1 p1 0..300 layers 3..4 sealed=0 exact=5 sinks seal->@192 seal->@200 seal->@208 keep(64) keep(44) sample
        = s0 says one
        = s1 says one
        --
        s0 p0 12..13 sealed=0 exact=1 sample
        s1 p1 300..301 sealed=3 exact=2 sample
        = s0 says one
        = s1 says one
        = s1 Length: 300+2 tokens, 0 cached; 192 sealed, 113 exact, 9984 bytes
        --
        s0 p0 13..14 sealed=0 exact=1 sample
        = s0 says one
        --
    "#]]);
}

#[test]
fn a_compressed_prompt_within_a_step_passes_all_layers_at_once() {
    let mut s = Script::new(config(16));
    s.enqueue(request(1, 0, 128, 1));
    s.enqueue(request(1, 1, 30, 1));
    s.steps(2).finish(expect![[r#"
        = s0 starts after 1s, 0 cached
        = s1 starts after 1s, 0 cached
        s0 p1 0..128 layers 0..1 sealed=0 exact=2 sinks seal->@64 keep(64)
        s0 p1 0..128 layers 1..2 sealed=0 exact=2 sinks seal->@64 keep(64)
        s0 p1 0..128 layers 2..3 sealed=0 exact=2 sinks seal->@64 keep(64)
        s1 p1 0..30 layers 0..4 sealed=0 exact=1 keep(30) sample
        = s1 says one
        = s1 Length: 30+1 tokens, 0 cached; 0 sealed, 30 exact, 4096 bytes
        --
        s0 p1 0..128 layers 3..4 sealed=0 exact=2 sinks seal->@64 keep(64) sample
        = s0 says one
        = s0 Length: 128+1 tokens, 0 cached; 64 sealed, 68 exact, 4864 bytes
        --
    "#]]);
}

#[test]
fn equal_prompts_share_complete_pages_exact() {
    let mut s = Script::new(config(16));
    s.enqueue(request(0, 0, 128, 1));
    s.steps(1);
    s.enqueue(request(0, 0, 128, 1));
    s.enqueue(request(0, 0, 140, 1));
    s.steps(2).finish(expect![[r#"
        = s0 starts after 1s, 0 cached
        s0 p0 0..128 sealed=0 exact=2 sample
        = s0 says one
        = s0 Length: 128+1 tokens, 0 cached; 0 sealed, 128 exact, 8192 bytes
        --
        = s1 starts after 1s, 64 cached
        = s2 starts after 1s, 128 cached
        s1 p0 64..128 sealed=0 exact=2 sample
        s2 p0 128..140 sealed=0 exact=3 sample
        = s1 says one
        = s1 Length: 128+1 tokens, 64 cached; 0 sealed, 128 exact, 8192 bytes
        = s2 says one
        = s2 Length: 140+1 tokens, 128 cached; 0 sealed, 140 exact, 12288 bytes
        --
    "#]]);
}

#[test]
fn equal_prompts_share_sealed_pages_and_sinks() {
    let mut s = Script::new(config(24));
    s.enqueue(request(1, 0, 200, 1));
    s.skip(7);
    s.enqueue(request(1, 0, 200, 1));
    s.enqueue(request(1, 0, 260, 1));
    s.steps(4).finish(expect![[r#"
        ... 7 steps
        = s1 starts after 1s, 128 cached
        = s2 starts after 1s, 128 cached
        s1 p1 128..200 layers 0..4 sealed=2 exact=2 keep(64) keep(8) sample
        s2 p1 128..260 layers 0..1 sealed=2 exact=3 seal->@144 keep(64) keep(4)
        s2 p1 128..192 layers 1..2 sealed=2 exact=1
        = s1 says one
        = s1 Length: 200+1 tokens, 128 cached; 128 sealed, 76 exact, 9472 bytes
        --
        s2 p1 192..260 layers 1..2 sealed=2 exact=3 seal->@144 keep(64) keep(4)
        s2 p1 128..260 layers 2..3 sealed=2 exact=3 seal->@144 keep(64) keep(4)
        s2 p1 128..260 layers 3..4 sealed=2 exact=3 seal->@144 keep(64) keep(4) sample
        = s2 says one
        = s2 Length: 260+1 tokens, 128 cached; 192 sealed, 72 exact, 9984 bytes
        --
    "#]]);
}

#[test]
fn equal_prompts_at_once_are_computed_once() {
    let mut s = Script::new(config(24));
    for _ in 0..3 {
        s.enqueue(request(1, 0, 200, 1));
    }
    s.enqueue(request(0, 5, 20, 1));
    s.steps(9).finish(expect![[r#"
        = s0 starts after 1s, 0 cached
        = s3 starts after 1s, 0 cached
        s0 p1 0..200 layers 0..1 sealed=0 exact=4 sinks seal->@128 seal->@136 keep(64) keep(8)
        s0 p1 0..200 layers 1..2 sealed=0 exact=4 sinks seal->@128 seal->@136 keep(64) keep(8)
        s3 p0 0..20 sealed=0 exact=1 sample
        = s3 says one
        = s3 Length: 20+1 tokens, 0 cached; 0 sealed, 20 exact, 4096 bytes
        --
        s0 p1 0..200 layers 2..3 sealed=0 exact=4 sinks seal->@128 seal->@136 keep(64) keep(8)
        s0 p1 0..200 layers 3..4 sealed=0 exact=4 sinks seal->@128 seal->@136 keep(64) keep(8) sample
        = s0 says one
        = s0 Length: 200+1 tokens, 0 cached; 128 sealed, 76 exact, 9472 bytes
        --
        = s1 starts after 3s, 128 cached
        = s2 starts after 3s, 128 cached
        s1 p1 128..200 layers 0..4 sealed=2 exact=2 keep(64) keep(8) sample
        s2 p1 128..200 layers 0..1 sealed=2 exact=2 keep(64) keep(8)
        s2 p1 128..200 layers 1..2 sealed=2 exact=2 keep(64) keep(8)
        s2 p1 128..200 layers 2..3 sealed=2 exact=2 keep(64) keep(8)
        = s1 says one
        = s1 Length: 200+1 tokens, 128 cached; 128 sealed, 76 exact, 9472 bytes
        --
        s2 p1 128..200 layers 3..4 sealed=2 exact=2 keep(64) keep(8) sample
        = s2 says one
        = s2 Length: 200+1 tokens, 128 cached; 128 sealed, 76 exact, 9472 bytes
        --
    "#]]);
}

#[test]
fn requests_that_differ_in_salt_adapter_or_profile_share_nothing() {
    let mut s = Script::new(config(24));
    s.enqueue(request(0, 0, 128, 1));
    s.skip(1);
    s.enqueue(GenerateRequest { cache_salt: 1, ..request(0, 0, 130, 1) });
    s.enqueue(GenerateRequest { adapter: AdapterGeneration(1), ..request(0, 0, 130, 1) });
    s.enqueue(GenerateRequest { prompt_logprobs: Some(1), ..request(0, 0, 130, 1) });
    let mut lines = 0;
    for _ in 0..8 {
        s.steps(1);
        lines += s.text.lines().filter(|line| line.contains("starts") && !line.ends_with(" 0 cached")).count();
    }
    assert_eq!(lines, 0, "{}", s.text);
}

#[test]
fn a_page_is_sealed_while_decoding() {
    let mut s = Script::new(config(16));
    s.enqueue(request(1, 0, 126, 70));
    s.steps(4).skip(61).steps(2).finish(expect![[r#"
        = s0 starts after 1s, 0 cached
        s0 p1 0..126 layers 0..4 sealed=0 exact=2 keep(64) keep(62) sample
        = s0 says one
        --
        s0 p1 126..127 sealed=0 exact=2 sample
        = s0 says one
        --
        s0 p1 127..128 sealed=0 exact=2 sinks seal->@128 sample
        = s0 says one
        --
        s0 p1 128..129 sealed=1 exact=2 sample
        = s0 says one
        --
        ... 61 steps
        s0 p1 190..191 sealed=1 exact=2 sample
        = s0 says one
        --
        s0 p1 191..192 sealed=1 exact=2 seal->@136 sample
        = s0 says one
        --
    "#]]);
}

#[test]
fn the_youngest_is_preempted_and_goes_on_where_it_was() {
    let mut s = Script::new(config(3));
    s.enqueue(request(0, 0, 63, 66));
    s.enqueue(request(0, 1, 60, 20));
    s.skip(1).steps(6).finish(expect![[r#"
        ... 1 steps
        s0 p0 63..64 sealed=0 exact=1 sample
        s1 p0 60..61 sealed=0 exact=1 sample
        = s0 says one
        = s1 says one
        --
        s0 p0 64..65 sealed=0 exact=2 sample
        s1 p0 61..62 sealed=0 exact=1 sample
        = s0 says one
        = s1 says one
        --
        s0 p0 65..66 sealed=0 exact=2 sample
        s1 p0 62..63 sealed=0 exact=1 sample
        = s0 says one
        = s1 says one
        --
        s0 p0 66..67 sealed=0 exact=2 sample
        s1 p0 63..64 sealed=0 exact=1 sample
        = s0 says one
        = s1 says one
        --
        = s1 preempted
        s0 p0 67..68 sealed=0 exact=2 sample
        = s0 says one
        --
        s0 p0 68..69 sealed=0 exact=2 sample
        = s0 says one
        --
    "#]]);
    s.skip(58).steps(8).finish(expect![[r#"
        ... 58 steps
        s0 p0 127..128 sealed=0 exact=2 sample
        = s0 says one
        = s0 Length: 63+66 tokens, 0 cached; 0 sealed, 128 exact, 8192 bytes
        --
        s1 p0 64..65 sealed=0 exact=2 sample
        = s1 says one
        --
        s1 p0 65..66 sealed=0 exact=2 sample
        = s1 says one
        --
        s1 p0 66..67 sealed=0 exact=2 sample
        = s1 says one
        --
        s1 p0 67..68 sealed=0 exact=2 sample
        = s1 says one
        --
        s1 p0 68..69 sealed=0 exact=2 sample
        = s1 says one
        --
        s1 p0 69..70 sealed=0 exact=2 sample
        = s1 says one
        --
        s1 p0 70..71 sealed=0 exact=2 sample
        = s1 says one
        --
    "#]]);
}

#[test]
fn what_was_preempted_three_times_is_shielded() {
    let mut s = Script::new(config(4));
    let asks = |priority, document, prompt| GenerateRequest { priority, ..request(0, document, prompt, 100) };
    s.enqueue(asks(9, 0, 60));
    let mut told = String::new();
    let mut until_preempted = |s: &mut Script| {
        s.steps_until(500, "preempted");
        told.extend(s.text.lines().filter(|line| line.contains("preempted") || line.contains("Length")).map(|line| format!("{line}\n")));
        s.text.clear();
    };
    // Three times somebody more urgent takes the pages of s0, and goes.
    for document in 1..4 {
        let urgent = s.enqueue(asks(0, document, 120));
        until_preempted(&mut s);
        s.scheduler.cancel(urgent);
    }
    // Then s5, though it is the more urgent one, makes room.
    s.steps(2);
    assert!(s.text.contains("s0 p0"), "s0 runs again: {}", s.text);
    s.enqueue(asks(0, 4, 60));
    s.enqueue(asks(5, 5, 60));
    until_preempted(&mut s);
    expect![[r#"
        = s0 preempted
        = s0 preempted
        = s0 preempted
        = s5 preempted
    "#]]
    .assert_eq(&told);
}

/// Pages of an equal beginning, which others left scattered over slabs, fit when a sequence starts and leave it no room to grow. It starts again
/// in an emptied arena, and so not beside one that came at that moment and goes before it.
#[test]
fn what_starts_again_to_be_alone_waits_until_it_is() {
    // Four sealed or workspace pages to a slab.
    let mut six_slabs = Config { max_num_batched_tokens: 1024, ..config(6) };
    six_slabs.profiles[1].sizes = PageSizes { exact: SLAB, sealed: 1024, sinks: 0, workspace: 1024 };
    six_slabs.profiles[1].split = SealedSplit { keys: 400, values: 400, metadata: 224 };
    six_slabs.profiles[1].sinks = 0;
    let mut s = Script::new(six_slabs);
    // A document that grows, and three others between, so that each of its five pages is in another slab.
    for pages in 1..=5 {
        s.enqueue(request(1, 0, 64 * pages + 64, 1));
        s.steps(1);
        for other in 0..if pages < 5 { 3 } else { 0 } {
            s.enqueue(request(1, 3 * pages + other, 128, 1));
            s.steps(1);
        }
    }
    s.text.clear();
    s.enqueue(request(1, 0, 384, 60));
    s.steps(1);
    s.enqueue(GenerateRequest { priority: -1, ..request(0, 99, 10, 2) });
    s.steps(4).finish(expect![[r#"
        = s17 starts after 1s, 320 cached
        s17 p1 320..384 layers 0..4 sealed=5 exact=1 keep(64) sample
        = s17 says one
        --
        = s17 preempted
        = s18 starts after 1s, 0 cached
        s18 p0 0..10 sealed=0 exact=1 sample
        = s18 says one
        --
        s18 p0 10..11 sealed=0 exact=1 sample
        = s18 says one
        = s18 Length: 10+2 tokens, 0 cached; 0 sealed, 11 exact, 4096 bytes
        --
        s17 p1 0..384 layers 0..4 sealed=0 exact=6 seal->@128 seal->@144 seal->@160 seal->@176 seal->@192 keep(64)
        --
        s17 p1 384..385 sealed=5 exact=2 sample
        = s17 says one
        --
    "#]]);
    s.skip(70);
    assert!(s.scheduler.is_idle() && s.held() == 0);
}

#[test]
fn a_cancel_is_complete_in_every_state() {
    // Unknown, waiting, waiting for an equal prompt, in flight (each kind of row), between steps, preempted, done.
    let mut s = Script::new(config(16));
    assert!(s.scheduler.cancel(SeqId(99)).is_none());
    let waiting = s.enqueue(request(0, 0, 100, 5));
    assert!(s.scheduler.cancel(waiting).is_some());
    assert!(s.scheduler.cancel(waiting).is_none());
    assert!(s.scheduler.is_idle());

    for profile in [0, 1] {
        for steps in 0..12 {
            for in_flight in [false, true] {
                let mut s = Script::new(config(16));
                let seq = s.enqueue(request(profile, 0, 190, 5));
                let parked = s.enqueue(request(profile, 0, 190, 5));
                s.skip(steps);
                if in_flight {
                    s.plan();
                    let held = s.held();
                    s.scheduler.cancel(seq);
                    s.scheduler.cancel(parked);
                    assert_eq!(s.held(), held, "pages stay while a step is in flight");
                    s.check();
                    s.text.clear();
                    s.commit(WORD);
                    assert_eq!(s.text, "--\n", "a cancelled sequence says nothing");
                } else {
                    s.scheduler.cancel(seq);
                    s.check();
                    s.scheduler.cancel(parked);
                }
                assert_eq!(s.held(), 0, "profile {profile}, step {steps}");
                assert!(s.scheduler.is_idle());
                s.check();
            }
        }
    }

    let mut s = Script::new(config(3));
    s.enqueue(request(0, 0, 63, 60));
    let preempted = s.enqueue(request(0, 1, 63, 60));
    s.steps(3);
    assert!(s.text.contains("s1 preempted"), "{}", s.text);
    assert_eq!(s.scheduler.cancel(preempted).map(|ended| ended.usage.completion_tokens), Some(2));
    s.check();
}

#[test]
fn who_waits_for_an_equal_prompt_goes_on_when_that_is_cancelled() {
    let mut s = Script::new(config(16));
    let first = s.enqueue(request(1, 0, 200, 1));
    s.enqueue(request(1, 0, 200, 1));
    s.steps(1);
    s.plan();
    s.scheduler.cancel(first);
    s.commit(WORD);
    s.steps(1).finish(expect![[r#"
        = s0 starts after 1s, 0 cached
        s0 p1 0..200 layers 0..1 sealed=0 exact=4 sinks seal->@128 seal->@136 keep(64) keep(8)
        s0 p1 0..200 layers 1..2 sealed=0 exact=4 sinks seal->@128 seal->@136 keep(64) keep(8)
        s0 p1 0..64 layers 2..3 sealed=0 exact=1
        --
        s0 p1 64..200 layers 2..3 sealed=0 exact=4 sinks seal->@128 seal->@136 keep(64) keep(8)
        s0 p1 0..200 layers 3..4 sealed=0 exact=4 sinks seal->@128 seal->@136 keep(64) keep(8) sample
        --
        = s1 starts after 3s, 0 cached
        s1 p1 0..200 layers 0..1 sealed=0 exact=4 sinks seal->@0 seal->@8 keep(64) keep(8)
        s1 p1 0..200 layers 1..2 sealed=0 exact=4 sinks seal->@0 seal->@8 keep(64) keep(8)
        s1 p1 0..64 layers 2..3 sealed=0 exact=1
        --
    "#]]);
}

#[test]
fn who_waits_for_its_adapter_is_passed_and_starts_when_that_is_there() {
    let mut s = Script::new(config(16));
    let worn = GenerateRequest { adapter: AdapterGeneration(9), ..request(0, 0, 20, 1) };
    s.enqueue(worn.clone());
    s.enqueue(request(0, 1, 20, 2));
    s.scheduler.await_adapters([AdapterGeneration(8), AdapterGeneration(9)]);
    // Somebody else, then nobody: all that is left waits.
    s.steps(3);
    s.scheduler.await_adapters([AdapterGeneration(8)]);
    s.steps(1).finish(expect![[r#"
        = s1 starts after 1s, 0 cached
        s1 p0 0..20 sealed=0 exact=1 sample
        = s1 says one
        --
        s1 p0 20..21 sealed=0 exact=1 sample
        = s1 says one
        = s1 Length: 20+2 tokens, 0 cached; 0 sealed, 21 exact, 4096 bytes
        --
        = s0 starts after 4s, 0 cached
        s0 p0 0..20 sealed=0 exact=1 sample
        = s0 says one
        = s0 Length: 20+1 tokens, 0 cached; 0 sealed, 20 exact, 4096 bytes
        --
    "#]]);
    // One that runs goes on, whatever is under way.
    s.enqueue(GenerateRequest { max_new_tokens: 3, ..worn });
    s.steps(1);
    s.scheduler.await_adapters([AdapterGeneration(9)]);
    s.steps(2).finish(expect![[r#"
        = s2 starts after 1s, 0 cached
        s2 p0 0..20 sealed=0 exact=1 sample
        = s2 says one
        --
        s2 p0 20..21 sealed=0 exact=1 sample
        = s2 says one
        --
        s2 p0 21..22 sealed=0 exact=1 sample
        = s2 says one
        = s2 Length: 20+3 tokens, 0 cached; 0 sealed, 22 exact, 4096 bytes
        --
    "#]]);
}

/// What a long prompt offers all at its end is not waited for by one that shares no more than its beginning.
#[test]
fn a_shared_beginning_is_not_waited_for_longer_than_it_takes_to_compute() {
    let mut s = Script::new(config(64));
    s.enqueue(request(1, 0, 3000, 1));
    s.steps(1);
    s.enqueue(request(1, 0, 200, 1));
    s.skip(1).steps(2).finish(expect![[r#"
        = s0 starts after 1s, 0 cached
        s0 p1 0..512 layers 0..1 sealed=0 exact=8
        --
        ... 1 steps
        s0 p1 768..1024 layers 0..1 sealed=0 exact=16
        s1 p1 0..200 layers 1..2 sealed=0 exact=4 sinks seal->@488 seal->@496 keep(64) keep(8)
        --
        s0 p1 1024..1280 layers 0..1 sealed=0 exact=20
        s1 p1 0..200 layers 2..3 sealed=0 exact=4 sinks seal->@488 seal->@496 keep(64) keep(8)
        --
    "#]]);
}

/// Whoever waits for a page that another computes must have it sooner than it would compute it, also when others come between.
#[test]
fn a_page_is_not_waited_for_behind_others() {
    // s0 is the less urgent one, and has no share beside those that keep coming.
    let mut s = Script::new(config(64));
    s.enqueue(GenerateRequest { priority: 5, ..request(0, 0, 1000, 1) });
    s.steps(1);
    s.enqueue(request(0, 0, 1000, 1));
    for document in 1..30 {
        s.enqueue(request(0, document, 100, 1));
        s.steps(1);
    }
    assert!(s.text.contains("s1 Length"), "{}", s.text);
    // s1 would offer a page soon, but has no share before s0 is done; s2 has one at once.
    let mut s = Script::new(config(128));
    s.enqueue(request(0, 1, 3000, 1));
    s.enqueue(request(0, 2, 3500, 1));
    s.steps(1);
    s.enqueue(request(0, 2, 200, 1));
    s.skip(1).steps(3).finish(expect![[r#"
        = s0 starts after 1s, 0 cached
        s0 p0 0..128 sealed=0 exact=2
        --
        ... 1 steps
        s0 p0 192..256 sealed=0 exact=4
        s2 p0 64..128 sealed=0 exact=2
        --
        s0 p0 256..320 sealed=0 exact=5
        s2 p0 128..192 sealed=0 exact=3
        --
        s0 p0 320..384 sealed=0 exact=6
        s2 p0 192..200 sealed=0 exact=4 sample
        = s2 says one
        = s2 Length: 200+1 tokens, 0 cached; 0 sealed, 200 exact, 16384 bytes
        --
    "#]]);
}

#[test]
fn who_waits_for_a_page_takes_nobodys_place() {
    let mut s = Script::new(Config { max_num_seqs: 3, ..config(128) });
    for document in [0, 0, 1, 2] {
        s.enqueue(request(0, document, 1000, 1));
    }
    for _ in 0..4 {
        s.steps(1);
        let before = s.scheduler.pool().changes();
        s.plan();
        assert_eq!(s.scheduler.pool().changes(), before, "a plan took pages from one and gave them back:\n{}", s.text);
        s.commit(WORD);
    }
}

#[test]
fn one_before_them_takes_the_place_of_those_that_computed_nothing() {
    let mut s = Script::new(Config { max_num_seqs: 3, ..config(64) });
    for document in 0..3 {
        s.enqueue(request(0, document, 1000, 1));
    }
    s.steps(1);
    s.enqueue(GenerateRequest { priority: -1, ..request(0, 9, 20, 1) });
    // The last of them gives up its place; it had not started, and nothing is told of it.
    s.steps(2).finish(expect![[r#"
        = s0 starts after 1s, 0 cached
        s0 p0 0..128 sealed=0 exact=2
        --
        = s3 starts after 1s, 0 cached
        s3 p0 0..20 sealed=0 exact=1 sample
        s0 p0 128..192 sealed=0 exact=3
        = s3 says one
        = s3 Length: 20+1 tokens, 0 cached; 0 sealed, 20 exact, 4096 bytes
        --
        s0 p0 192..320 sealed=0 exact=5
        --
    "#]]);
}

#[test]
fn of_equal_prompts_the_first_is_done_first() {
    let mut s = Script::new(config(64));
    s.enqueue(request(0, 0, 300, 1));
    s.enqueue(request(0, 1, 300, 1));
    s.steps(6).finish(expect![[r#"
        = s0 starts after 1s, 0 cached
        s0 p0 0..128 sealed=0 exact=2
        --
        s0 p0 128..256 sealed=0 exact=4
        --
        = s1 starts after 3s, 0 cached
        s0 p0 256..300 sealed=0 exact=5 sample
        s1 p0 0..64 sealed=0 exact=1
        = s0 says one
        = s0 Length: 300+1 tokens, 0 cached; 0 sealed, 300 exact, 20480 bytes
        --
        s1 p0 64..192 sealed=0 exact=3
        --
        s1 p0 192..300 sealed=0 exact=5 sample
        = s1 says one
        = s1 Length: 300+1 tokens, 0 cached; 0 sealed, 300 exact, 20480 bytes
        --
    "#]]);
}

#[test]
fn what_was_computed_does_not_expire_in_the_queue_it_was_sent_back_to() {
    let mut s = Script::new(config(6));
    s.enqueue(GenerateRequest { priority: -1, ..request(0, 0, 126, 40) });
    s.steps(1);
    let timeout = Duration::from_secs(40);
    s.enqueue(GenerateRequest { queue_timeout: timeout, ..request(0, 1, 250, 5) });
    s.steps_until(10, "s1 preempted");
    assert!(!s.text.contains("s1 says"), "before its first token");
    s.now += timeout;
    let mut out = Vec::new();
    s.scheduler.expire(s.now, &mut out);
    s.tell(&out);
    assert!(!s.text.contains("QueueTimeout"), "{}", s.text);
    s.steps_until(60, "s1 Length");
}

#[test]
fn a_huge_prompt_and_short_chats_both_advance() {
    let mut s = Script::new(Config { max_num_batched_tokens: 256, ..config(64) });
    s.enqueue(request(0, 0, 1000, 2));
    s.steps(1);
    for chat in 1..4 {
        s.enqueue(request(0, chat, 50 + chat, 2));
    }
    s.steps(5).finish(expect![[r#"
        = s0 starts after 1s, 0 cached
        s0 p0 0..256 sealed=0 exact=4
        --
        = s1 starts after 1s, 0 cached
        = s2 starts after 1s, 0 cached
        s0 p0 256..384 sealed=0 exact=6
        s1 p0 0..51 sealed=0 exact=1 sample
        s2 p0 0..52 sealed=0 exact=1 sample
        = s1 says one
        = s2 says one
        --
        = s3 starts after 2s, 0 cached
        s1 p0 51..52 sealed=0 exact=1 sample
        s2 p0 52..53 sealed=0 exact=1 sample
        s0 p0 384..576 sealed=0 exact=9
        s3 p0 0..53 sealed=0 exact=1 sample
        = s1 says one
        = s1 Length: 51+2 tokens, 0 cached; 0 sealed, 52 exact, 4096 bytes
        = s2 says one
        = s2 Length: 52+2 tokens, 0 cached; 0 sealed, 53 exact, 4096 bytes
        = s3 says one
        --
        s3 p0 53..54 sealed=0 exact=1 sample
        s0 p0 576..768 sealed=0 exact=12
        = s3 says one
        = s3 Length: 53+2 tokens, 0 cached; 0 sealed, 54 exact, 4096 bytes
        --
        s0 p0 768..1000 sealed=0 exact=16 sample
        = s0 says one
        --
        s0 p0 1000..1001 sealed=0 exact=16 sample
        = s0 says one
        = s0 Length: 1000+2 tokens, 0 cached; 0 sealed, 1001 exact, 65536 bytes
        --
    "#]]);
}

#[test]
fn a_short_chat_behind_two_huge_prompts_goes_before_the_second() {
    let mut s = Script::new(Config { max_num_batched_tokens: 256, ..config(64) });
    s.enqueue(request(0, 0, 1000, 1));
    s.enqueue(request(1, 1, 1000, 1));
    s.steps(1);
    s.enqueue(request(0, 2, 50, 1));
    s.steps(2).finish(expect![[r#"
        = s0 starts after 1s, 0 cached
        s0 p0 0..256 sealed=0 exact=4
        --
        = s2 starts after 1s, 0 cached
        s0 p0 256..448 sealed=0 exact=7
        s2 p0 0..50 sealed=0 exact=1 sample
        = s2 says one
        = s2 Length: 50+1 tokens, 0 cached; 0 sealed, 50 exact, 4096 bytes
        --
        s0 p0 448..704 sealed=0 exact=11
        --
    "#]]);
}

#[test]
fn what_waits_for_room_starts_as_soon_as_there_is() {
    let mut s = Script::new(config(4));
    s.enqueue(request(0, 0, 10, 40));
    s.enqueue(request(0, 1, 100, 3));
    s.steps(1);
    s.enqueue(request(0, 2, 150, 1));
    s.steps(3).finish(expect![[r#"
        = s0 starts after 1s, 0 cached
        = s1 starts after 1s, 0 cached
        s0 p0 0..10 sealed=0 exact=1 sample
        s1 p0 0..100 sealed=0 exact=2 sample
        = s0 says one
        = s1 says one
        --
        s0 p0 10..11 sealed=0 exact=1 sample
        s1 p0 100..101 sealed=0 exact=2 sample
        = s0 says one
        = s1 says one
        --
        s0 p0 11..12 sealed=0 exact=1 sample
        s1 p0 101..102 sealed=0 exact=2 sample
        = s0 says one
        = s1 says one
        = s1 Length: 100+3 tokens, 0 cached; 0 sealed, 102 exact, 8192 bytes
        --
        = s2 starts after 3s, 0 cached
        s0 p0 12..13 sealed=0 exact=1 sample
        s2 p0 0..64 sealed=0 exact=1
        = s0 says one
        --
    "#]]);
}

#[test]
fn nobody_passes_what_does_not_fit_and_priority_goes_first() {
    let mut s = Script::new(config(4));
    s.enqueue(request(0, 0, 120, 30));
    s.steps(1);
    s.enqueue(request(0, 1, 190, 1));
    s.enqueue(request(0, 2, 10, 1));
    s.steps(1);
    s.enqueue(GenerateRequest { priority: -1, ..request(0, 3, 20, 1) });
    s.steps(1).skip(27).steps(4).finish(expect![[r#"
        = s0 starts after 1s, 0 cached
        s0 p0 0..120 sealed=0 exact=2 sample
        = s0 says one
        --
        s0 p0 120..121 sealed=0 exact=2 sample
        = s0 says one
        --
        = s3 starts after 1s, 0 cached
        s0 p0 121..122 sealed=0 exact=2 sample
        s3 p0 0..20 sealed=0 exact=1 sample
        = s0 says one
        = s3 says one
        = s3 Length: 20+1 tokens, 0 cached; 0 sealed, 20 exact, 4096 bytes
        --
        ... 27 steps
        = s1 starts after 30s, 0 cached
        = s2 starts after 30s, 0 cached
        s1 p0 0..64 sealed=0 exact=1
        s2 p0 0..10 sealed=0 exact=1 sample
        = s2 says one
        = s2 Length: 10+1 tokens, 0 cached; 0 sealed, 10 exact, 4096 bytes
        --
        s1 p0 64..190 sealed=0 exact=3 sample
        = s1 says one
        = s1 Length: 190+1 tokens, 0 cached; 0 sealed, 190 exact, 12288 bytes
        --
    "#]]);
}

#[test]
fn what_can_never_fit_is_refused() {
    let mut s = Script::new(config(4));
    let mut refused = |request| s.scheduler.enqueue(SeqId(9), request, Duration::ZERO).err();
    // 4 exact pages hold 256 positions; the last token generated is not one of them.
    assert_eq!(refused(request(0, 0, 250, 8)), Some(Refused::TooLarge { need: 5 * SLAB, have: 4 * SLAB }));
    assert_eq!(refused(request(0, 0, 3990, 11)), Some(Refused::TooLong { tokens: 4001, max_model_len: 4000 }));
    assert_eq!(refused(request(2, 0, 10, 1)), Some(Refused::Malformed("no such cache profile")));
    assert_eq!(refused(request(0, 0, 0, 1)), Some(Refused::Malformed("no tokens to read or to write")));
    s.enqueue(request(0, 0, 250, 7));
    s.scheduler.drain();
    assert_eq!(s.scheduler.enqueue(SeqId(9), request(0, 2, 10, 1), Duration::ZERO), Err(Refused::Draining));
    s.skip(9);
    assert!(s.scheduler.is_idle(), "what was queued before the drain runs");
}

#[test]
fn admission_is_exact_to_the_token() {
    for profile in [0, 1] {
        for slabs in 2..9 {
            let mut scheduler = Scheduler::new(config(slabs)).expect("a sound configuration");
            let mut takes = |prompt| scheduler.enqueue(SeqId(u64::from(prompt)), request(profile, 0, prompt, 64), Duration::ZERO).is_ok();
            let Some(longest) = (1..3000).take_while(|&n| takes(n)).last() else { continue };
            // The longest that is taken runs to its end in an arena of just that size, and holds pages enough for itself alone.
            let mut s = Script::new(config(slabs));
            s.enqueue(request(profile, 0, longest, 64));
            s.skip(64 + 4 * longest as usize);
            assert!(s.scheduler.is_idle(), "profile {profile}, {slabs} slabs, {longest} tokens");
            assert_eq!(s.held(), 0);
        }
    }
}

#[test]
fn a_request_that_waits_too_long_is_told_so() {
    let mut s = Script::new(Config { max_num_seqs: 1, ..config(16) });
    s.enqueue(request(0, 0, 10, 9));
    s.enqueue(GenerateRequest { queue_timeout: Duration::from_secs(3), ..request(0, 1, 10, 1) });
    s.steps(1);
    assert_eq!(s.scheduler.next_deadline(), Some(Duration::from_secs(3)));
    let mut out = Vec::new();
    s.scheduler.expire(Duration::from_millis(2999), &mut out);
    assert!(out.is_empty());
    s.scheduler.expire(Duration::from_secs(3), &mut out);
    s.tell(&out);
    s.check();
    assert_eq!(s.scheduler.next_deadline(), None);
    s.steps(1).finish(expect![[r#"
        = s0 starts after 1s, 0 cached
        s0 p0 0..10 sealed=0 exact=1 sample
        = s0 says one
        --
        = s1 QueueTimeout after 0 tokens
        s0 p0 10..11 sealed=0 exact=1 sample
        = s0 says one
        --
    "#]]);
}

#[test]
fn what_holds_pages_and_computed_nothing_still_waits() {
    let mut s = Script::new(config(64));
    s.enqueue(request(0, 0, 500, 1));
    s.enqueue(GenerateRequest { queue_timeout: Duration::from_secs(3), ..request(0, 1, 1000, 1) });
    s.enqueue(request(0, 2, 500, 1));
    s.steps(2);
    let snapshot = s.scheduler.snapshot();
    assert_eq!((snapshot.running, snapshot.waiting, s.held()), (1, 2, 32 * SLAB));
    assert_eq!(s.scheduler.next_deadline(), Some(Duration::from_secs(3)));
    let mut out = Vec::new();
    s.scheduler.expire(Duration::from_secs(3), &mut out);
    s.tell(&out);
    s.check();
    assert_eq!((s.scheduler.next_deadline(), s.held()), (Some(Duration::MAX), 16 * SLAB));
    s.steps(3).finish(expect![[r#"
        = s0 starts after 1s, 0 cached
        s0 p0 0..128 sealed=0 exact=2
        --
        s0 p0 128..256 sealed=0 exact=4
        --
        = s1 QueueTimeout after 0 tokens
        s0 p0 256..384 sealed=0 exact=6
        --
        s0 p0 384..500 sealed=0 exact=8 sample
        = s0 says one
        = s0 Length: 500+1 tokens, 0 cached; 0 sealed, 500 exact, 32768 bytes
        --
        = s2 starts after 5s, 0 cached
        s2 p0 0..128 sealed=0 exact=2
        --
    "#]]);
}

#[test]
fn a_step_that_fails_is_repeated_in_halves_until_the_culprit_is_found() {
    let mut s = Script::new(config(16));
    for document in 0..5 {
        s.enqueue(request(0, document, 10, 4));
    }
    s.skip(1);
    for _ in 0..7 {
        s.plan();
        if s.plan.rows.iter().any(|row| row.seq == SeqId(3)) {
            let mut out = Vec::new();
            s.scheduler.step_failed(&s.plan.clone(), Failure::Internal("boom".into()), s.now, &mut out);
            s.text += "failed\n";
            s.tell(&out);
            s.check();
        } else {
            s.commit(WORD);
        }
    }
    assert!(s.scheduler.is_idle());
    s.finish(expect![[r#"
        ... 1 steps
        s0 p0 10..11 sealed=0 exact=1 sample
        s1 p0 10..11 sealed=0 exact=1 sample
        s2 p0 10..11 sealed=0 exact=1 sample
        s3 p0 10..11 sealed=0 exact=1 sample
        s4 p0 10..11 sealed=0 exact=1 sample
        failed
        s0 p0 10..11 sealed=0 exact=1 sample
        s1 p0 10..11 sealed=0 exact=1 sample
        s2 p0 10..11 sealed=0 exact=1 sample
        = s0 says one
        = s1 says one
        = s2 says one
        --
        s3 p0 10..11 sealed=0 exact=1 sample
        s4 p0 10..11 sealed=0 exact=1 sample
        failed
        s3 p0 10..11 sealed=0 exact=1 sample
        failed
        = s3 Internal("boom") after 1 tokens
        s4 p0 10..11 sealed=0 exact=1 sample
        = s4 says one
        --
        s0 p0 11..12 sealed=0 exact=1 sample
        s1 p0 11..12 sealed=0 exact=1 sample
        s2 p0 11..12 sealed=0 exact=1 sample
        s4 p0 11..12 sealed=0 exact=1 sample
        = s0 says one
        = s1 says one
        = s2 says one
        = s4 says one
        --
        s0 p0 12..13 sealed=0 exact=1 sample
        s1 p0 12..13 sealed=0 exact=1 sample
        s2 p0 12..13 sealed=0 exact=1 sample
        s4 p0 12..13 sealed=0 exact=1 sample
        = s0 says one
        = s0 Length: 10+4 tokens, 0 cached; 0 sealed, 13 exact, 4096 bytes
        = s1 says one
        = s1 Length: 10+4 tokens, 0 cached; 0 sealed, 13 exact, 4096 bytes
        = s2 says one
        = s2 Length: 10+4 tokens, 0 cached; 0 sealed, 13 exact, 4096 bytes
        = s4 says one
        = s4 Length: 10+4 tokens, 0 cached; 0 sealed, 13 exact, 4096 bytes
        --
    "#]]);
}

#[test]
fn a_layered_prefill_that_failed_starts_over() {
    let mut s = Script::new(config(16));
    s.enqueue(request(0, 9, 10, 99));
    s.enqueue(request(1, 0, 200, 2));
    s.skip(1);
    s.plan();
    s.scheduler.step_failed(&s.plan.clone(), Failure::Internal("boom".into()), s.now, &mut Vec::new());
    s.text += "failed\n";
    s.steps(3).finish(expect![[r#"
        ... 1 steps
        s0 p0 10..11 sealed=0 exact=1 sample
        s1 p1 64..200 layers 2..3 sealed=0 exact=4 sinks seal->@192 seal->@200 keep(64) keep(8)
        s1 p1 0..200 layers 3..4 sealed=0 exact=4 sinks seal->@192 seal->@200 keep(64) keep(8) sample
        failed
        s0 p0 10..11 sealed=0 exact=1 sample
        = s0 says one
        --
        s1 p1 0..200 layers 0..1 sealed=0 exact=4 sinks seal->@192 seal->@200 keep(64) keep(8)
        s1 p1 0..200 layers 1..2 sealed=0 exact=4 sinks seal->@192 seal->@200 keep(64) keep(8)
        s1 p1 0..64 layers 2..3 sealed=0 exact=1
        --
        s0 p0 11..12 sealed=0 exact=1 sample
        s1 p1 64..200 layers 2..3 sealed=0 exact=4 sinks seal->@192 seal->@200 keep(64) keep(8)
        s1 p1 0..200 layers 3..4 sealed=0 exact=4 sinks seal->@192 seal->@200 keep(64) keep(8) sample
        = s0 says one
        = s1 says one
        --
    "#]]);
}

#[test]
fn results_that_do_not_suit_their_row_end_that_sequence_alone() {
    let mut s = Script::new(config(16));
    s.enqueue(request(0, 0, 10, 4));
    s.enqueue(request(0, 1, 10, 4));
    s.enqueue(request(0, 2, 10, 4));
    s.plan();
    s.commit_results(&[RowResult::Nothing, RowResult::Failed(Failure::Numerical), RowResult::Token(WORD)]);
    s.steps(1).finish(expect![[r#"
        = s0 starts after 1s, 0 cached
        = s1 starts after 1s, 0 cached
        = s2 starts after 1s, 0 cached
        s0 p0 0..10 sealed=0 exact=1 sample
        s1 p0 0..10 sealed=0 exact=1 sample
        s2 p0 0..10 sealed=0 exact=1 sample
        = s0 Internal("row 0 of the step returned Nothing for Last") after 0 tokens
        = s1 Numerical after 0 tokens
        = s2 says one
        --
        s2 p0 10..11 sealed=0 exact=1 sample
        = s2 says one
        --
    "#]]);
}

#[test]
fn pages_of_a_sequence_that_failed_leave_the_index() {
    let mut s = Script::new(config(16));
    s.enqueue(request(0, 0, 200, 1));
    s.skip(1);
    assert_eq!(s.scheduler.pool().indexed(), 2);
    s.plan();
    s.commit_results(&[RowResult::Failed(Failure::Numerical)]);
    assert_eq!(s.scheduler.pool().indexed(), 0);
    s.enqueue(request(0, 0, 200, 1));
    s.plan();
    s.finish(expect![[r#"
        ... 1 steps
        s0 p0 128..200 sealed=0 exact=4 sample
        = s0 Numerical after 0 tokens
        --
        = s1 starts after 1s, 0 cached
        s1 p0 0..128 sealed=0 exact=2
    "#]]);
}

/// A prefill offers its pages as they fill, and nobody has looked at what they lead to. Whoever fails on them does not leave them to others.
#[test]
fn pages_that_a_sequence_read_and_failed_on_leave_the_index_too() {
    let mut s = Script::new(config(16));
    let left = s.enqueue(request(0, 0, 200, 1));
    s.skip(1);
    s.scheduler.cancel(left);
    assert_eq!(s.scheduler.pool().indexed(), 2);
    s.enqueue(request(0, 0, 200, 1));
    s.plan();
    s.commit_results(&[RowResult::Failed(Failure::Numerical)]);
    assert_eq!((s.scheduler.pool().indexed(), s.held()), (0, 0));
    s.enqueue(request(0, 0, 200, 1));
    s.plan();
    s.finish(expect![[r#"
        ... 1 steps
        = s1 starts after 1s, 128 cached
        s1 p0 128..200 sealed=0 exact=4 sample
        = s1 Numerical after 0 tokens
        --
        = s2 starts after 1s, 0 cached
        s2 p0 0..128 sealed=0 exact=2
    "#]]);
    // A step that the backend failed says nothing of what was read.
    s.commit(WORD);
    s.scheduler.cancel(SeqId(2));
    s.enqueue(request(0, 0, 200, 1));
    s.plan();
    s.commit_results(&[RowResult::Failed(Failure::Internal("broken".into()))]);
    assert_eq!((s.scheduler.pool().indexed(), s.held()), (2, 0));
}

#[test]
fn the_snapshot_accounts_for_every_byte() {
    let mut s = Script::new(Config { arena_bytes: 16 * SLAB + 100, ..config(16) });
    s.enqueue(request(1, 0, 300, 9));
    s.enqueue(request(0, 1, 70, 2));
    s.plan();
    let mut seen = String::new();
    for _ in 0..14 {
        let now = s.scheduler.snapshot();
        let held: u64 = now.branches.iter().map(|(_, _, bytes)| bytes).sum();
        let bytes = s.scheduler.pool().bytes();
        assert_eq!((now.free_bytes, now.cached_bytes, held), (bytes.free, bytes.cached, bytes.held));
        assert_eq!(bytes.free + bytes.cached + bytes.held + bytes.lost, 16 * SLAB + 100);
        let of = |branch| now.branches.iter().filter(|b| b.1 == branch).map(|b| b.2).sum::<u64>();
        let line = [Branch::Window, Branch::Sinks, Branch::SealedKeys, Branch::SealedValues, Branch::Metadata, Branch::Workspace]
            .map(|branch| format!("{} {}", branch.label(), of(branch)))
            .join(", ");
        if !seen.contains(&line) {
            writeln!(seen, "{line}; cached {}, lost {}", now.cached_bytes, bytes.lost).expect("strings take everything");
        }
        s.commit(WORD);
        s.plan();
    }
    expect![[r#"
        window 16384, sinks 256, sealed_keys 600, sealed_values 600, metadata 336, workspace 10240; cached 0, lost 100
        window 8192, sinks 256, sealed_keys 600, sealed_values 600, metadata 336, workspace 0; cached 4096, lost 100
        window 0, sinks 0, sealed_keys 0, sealed_values 0, metadata 0, workspace 0; cached 5888, lost 100
    "#]]
    .assert_eq(&seen);
}

/// What slabs leave over beside pages that only the prefix index holds goes with these to whoever wants it: an idle server is empty.
#[test]
fn what_nobody_holds_is_no_use_of_the_cache() {
    // Two sealed pages to a slab, and a quarter of it left over.
    let mut config = Config { arena_bytes: 16 * SLAB + 100, max_num_batched_tokens: 1024, ..config(16) };
    config.profiles[1].sizes.sealed = 1536;
    config.profiles[1].split = SealedSplit { keys: 600, values: 600, metadata: 336 };
    let mut s = Script::new(config);
    let used = |s: &Script| {
        let now = s.scheduler.snapshot();
        (now.used_bytes, now.usable_bytes, now.cached_bytes)
    };
    assert_eq!(used(&s), (0, 16 * SLAB, 0));
    s.enqueue(request(1, 0, 320, 3));
    s.steps(2);
    // Four sealed pages with what is left over, the sinks block, and two exact pages.
    assert_eq!(used(&s), (2 * SLAB + 256 + 2 * SLAB, 16 * SLAB, 0));
    s.steps(1);
    assert_eq!(used(&s), (0, 16 * SLAB, 4 * 1536 + 256));
    s.enqueue(request(0, 1, 16 * 64, 1));
    s.plan();
    assert_eq!(used(&s), (16 * SLAB, 16 * SLAB, 0));
}

#[test]
fn a_configuration_that_could_starve_is_refused() {
    let tokens = |max_num_batched_tokens, max_num_seqs| Scheduler::new(Config { max_num_batched_tokens, max_num_seqs, ..config(4) }).err();
    assert_eq!(tokens(70, 8), Some(ConfigError::StepTooSmall { tokens: 70, seqs: 8, least: 71 }));
    assert_eq!(tokens(71, 8), None);
    let mut bad = config(4);
    bad.profiles[1].split.keys += 1;
    let error = Scheduler::new(bad).err().map(|e| e.to_string());
    assert_eq!(error.as_deref(), Some("cache profile 1: the parts of a sealed page do not sum to it"));
}

#[test]
fn a_bill_says_where_the_time_went() {
    let second = Duration::from_secs;
    let mut scheduler = Scheduler::new(config(10)).expect("a sound configuration");
    let (mut plan, mut out) = (StepPlan::default(), Vec::new());
    scheduler.enqueue(SeqId(0), request(0, 1, 100, 3), second(10)).expect("it fits");
    // Planned at 12; tokens at 15, 17 and 21.
    for (planned, done) in [(12, 15), (16, 17), (20, 21)] {
        scheduler.plan(second(planned), &mut plan, &mut out);
        scheduler.commit(&plan, &[RowResult::Token(WORD)], second(done), &mut out);
    }
    let Some(Outcome::Done { ended, .. }) = out.last() else { panic!("{out:?}") };
    assert_eq!(ended.usage.timings, Timings { queue: second(2), prefill: second(3), decode: second(6) });
}
