//! Who may wait for a start, and when to come again: the queue's book, without a scheduler.

use std::fmt::Write;
use std::time::Duration;

use expect_test::expect;

use strait::ids::SeqId;
use strait::scheduler::{Config, Limit, Queue};

use crate::scheduler::config;

#[test]
fn a_queue_takes_a_request_whole_or_not_at_all() {
    let mut queue = Queue::new(&Config { max_queued_requests: 3, max_queued_tokens: 100, ..config(4) });
    // What enters (prompts), or who leaves; then how many sequences wait, and what came of it.
    let mut transcript = String::new();
    for (prompts, leaves) in [
        (&[10, 10, 10][..], None),
        // One request is fewer than three, and two are.
        (&[1, 1], None),
        (&[1], None),
        (&[1], None),
        // The other sequence of the second waits still.
        (&[], Some(3)),
        (&[1], None),
        (&[], Some(4)),
        // Thirty-one tokens are fewer than a hundred.
        (&[80], None),
        (&[], Some(5)),
        (&[1], None),
        (&[], Some(0)),
        (&[], Some(0)),
        (&[1], None),
        (&[], Some(1)),
        (&[1], None),
        (&[], Some(2)),
        (&[], Some(6)),
        (&[], Some(7)),
        // Nobody waits: however many, and however long.
        (&[50, 50, 50, 50, 50], None),
        (&[0], None),
    ] {
        let said = match leaves {
            Some(seq) => {
                queue.leave(SeqId(seq));
                format!("s{seq} leaves")
            }
            None => format!("{prompts:?} enters: {:?}", queue.enter(prompts, Duration::ZERO)),
        };
        writeln!(transcript, "{said}; {} wait", queue.len()).expect("strings take everything");
    }
    expect![[r#"
        [10, 10, 10] enters: Ok([s0, s1, s2]); 3 wait
        [1, 1] enters: Ok([s3, s4]); 5 wait
        [1] enters: Ok([s5]); 6 wait
        [1] enters: Err((3, Requests)); 6 wait
        s3 leaves; 5 wait
        [1] enters: Err((3, Requests)); 5 wait
        s4 leaves; 4 wait
        [80] enters: Ok([s6]); 5 wait
        s5 leaves; 4 wait
        [1] enters: Err((2, Tokens)); 4 wait
        s0 leaves; 3 wait
        s0 leaves; 3 wait
        [1] enters: Err((2, Tokens)); 3 wait
        s1 leaves; 2 wait
        [1] enters: Ok([s7]); 3 wait
        s2 leaves; 2 wait
        s6 leaves; 1 wait
        s7 leaves; 0 wait
        [50, 50, 50, 50, 50] enters: Ok([s8, s9, s10, s11, s12]); 5 wait
        [0] enters: Err((1, Tokens)); 5 wait
    "#]]
    .assert_eq(&transcript);
}

/// A queue that single ones keep nearly full has its turn for a request of many sequences too, and for one of a long prompt.
#[test]
fn a_large_request_is_not_kept_out_by_small_ones() {
    for (limits, large) in [((8, 10_000), &[1; 4][..]), ((1000, 70), &[40])] {
        let mut queue = Queue::new(&Config { max_queued_requests: limits.0, max_queued_tokens: limits.1, ..config(4) });
        let mut small = 0;
        let mut fill = |queue: &mut Queue| {
            while queue.enter(&[10], Duration::ZERO).is_ok() {
                small += 1;
            }
        };
        fill(&mut queue);
        let full = queue.len();
        let taken = (0..100).find_map(|seq| {
            queue.start(SeqId(seq), Duration::ZERO);
            let taken = queue.enter(large, Duration::ZERO);
            fill(&mut queue);
            taken.ok()
        });
        assert_eq!(taken.map(|seqs| seqs.len()), Some(large.len()), "{small} small ones were taken meanwhile");
        assert!(queue.len() < full + large.len(), "it goes beyond the limit by itself alone");
        assert!(queue.enter(&[1], Duration::ZERO).is_err(), "and nobody else does");
    }
}

#[test]
fn a_refusal_says_how_fast_the_queue_drains_not_how_rarely_anybody_comes() {
    let mut queue = Queue::new(&config(4));
    let at = |s: f64| Duration::from_secs_f64(s);
    let mut transcript = String::new();
    let mut step = |queue: &mut Queue, enter: usize, starts: &[u64], now: f64| {
        queue.enter(&vec![1; enter], at(now)).expect("there is room");
        starts.iter().for_each(|&seq| queue.start(SeqId(seq), at(now)));
        let started = if starts.is_empty() { String::new() } else { format!(", {starts:?} start") };
        let entered = if enter == 0 { String::new() } else { format!(", {enter} come") };
        writeln!(transcript, "{now} s{entered}{started}; {} wait: {:?}", queue.len(), queue.retry_after(at(now)))
            .expect("strings take all");
    };
    for (now, enter, starts) in [
        // Nobody waits behind it: it says nothing of a queue.
        (0.0, 1, &[0][..]),
        (3600.0, 8, &[]),
        // No pace yet: as long as the oldest has waited.
        (3607.0, 0, &[]),
        // A crowd into places that were free.
        (3610.0, 0, &[1, 2, 3]),
        (3611.5, 0, &[4]),
        (3614.5, 0, &[5]),
        // Nothing has started for longer than the mean of 2.25 s.
        (3620.5, 0, &[]),
        (7000.0, 0, &[]),
        // The last one, an hour, and two starts that are 1 s apart.
        (7001.0, 0, &[6, 7, 8]),
        (10_800.0, 4, &[9]),
        (10_801.0, 0, &[10]),
        (10_801.5, 0, &[]),
    ] {
        step(&mut queue, enter, starts, now);
    }
    expect![[r#"
        0 s, 1 come, [0] start; 0 wait: 1s
        3600 s, 8 come; 8 wait: 1s
        3607 s; 8 wait: 7s
        3610 s, [1, 2, 3] start; 5 wait: 10s
        3611.5 s, [4] start; 4 wait: 1.5s
        3614.5 s, [5] start; 3 wait: 2.25s
        3620.5 s; 3 wait: 6s
        7000 s; 3 wait: 600s
        7001 s, [6, 7, 8] start; 0 wait: 1s
        10800 s, 4 come, [9] start; 3 wait: 1s
        10801 s, [10] start; 2 wait: 1s
        10801.5 s; 2 wait: 1s
    "#]]
    .assert_eq(&transcript);
}

#[test]
fn a_refusal_counts_the_starts_that_make_room() {
    // Two seconds from start to start. Of so many sequences of 10 tokens in each request the first two have started.
    for (requests, tokens, sequences, want) in [
        // The rest of the oldest request, all of two, and all there are.
        (3, 1000, &[5, 2, 3][..], (true, 6)),
        (2, 1000, &[3, 4], (true, 2)),
        (1, 1000, &[10], (true, 16)),
        // As many as bring tokens below their limit.
        (9, 75, &[5, 5], (true, 2)),
        (9, 60, &[5, 5], (true, 6)),
        (9, 1, &[10], (true, 16)),
        // Both of the oldest have started, so one waits; for the next there will be room after thirty.
        (2, 1000, &[2, 30], (false, 60)),
    ] {
        let at = Duration::from_secs;
        let mut queue = Queue::new(&Config { max_queued_requests: requests, max_queued_tokens: tokens, ..config(4) });
        for &n in sequences {
            queue.enter(&vec![10; n], at(0)).expect("no limit is reached yet");
        }
        queue.start(SeqId(0), at(2));
        queue.start(SeqId(1), at(4));
        let refused = queue.enter(&[1], at(4)).is_err();
        assert_eq!((refused, queue.retry_after(at(4)).as_secs()), want, "{requests} of {sequences:?}, {tokens} tokens");
    }
}

/// A batch of many prompts is one request: others go on being taken while it waits.
#[test]
fn a_batch_takes_one_place_in_the_queue() {
    let mut queue = Queue::new(&Config { max_queued_requests: 3, max_queued_tokens: 10_000, ..config(4) });
    assert_eq!(queue.enter(&[1; 1000], Duration::ZERO).expect("nobody waits").len(), 1000);
    assert!(queue.enter(&[1], Duration::ZERO).is_ok() && queue.enter(&[1; 7], Duration::ZERO).is_ok());
    assert_eq!(queue.enter(&[1], Duration::ZERO), Err((3, Limit::Requests)));
    (0..999).for_each(|seq| queue.start(SeqId(seq), Duration::ZERO));
    assert_eq!(queue.enter(&[1], Duration::ZERO), Err((3, Limit::Requests)), "one of it waits");
    queue.leave(SeqId(999));
    queue.leave(SeqId(999));
    assert!(queue.enter(&[1], Duration::ZERO).is_ok());
    assert_eq!(queue.len(), 9);
}
