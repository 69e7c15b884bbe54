//! How much text is worked on at once, and how much of it at all.

use std::sync::Condvar;

use super::*;

/// Bytes of one place for work on text.
const PLACE: usize = strait::server::SHORT_TEXT;
/// Places for long texts in these tests.
const PLACES: usize = 4;

const MIB: usize = 1 << 20;

/// What a tokenizer has in work.
#[derive(Default)]
struct Work {
    calls: usize,
    /// Of texts that are not short.
    long: Vec<usize>,
    /// The most bytes at once, and whether a long text that does not fit its places ever had company.
    most: usize,
    crowded: bool,
    now: usize,
    /// Texts that begin with `held` stay in work until then.
    released: bool,
}

/// Token ids are bytes, of a text that a normaliser might have dropped parts of.
#[derive(Clone, Default)]
struct Counting(Arc<(Mutex<Work>, Condvar)>);

impl Counting {
    fn work(&self) -> std::sync::MutexGuard<'_, Work> {
        self.0.0.lock().expect("no test panics while it holds this")
    }
}

impl Codec for Counting {
    fn encode(&self, text: &str, add_special_tokens: bool, parse_special: bool) -> Result<Vec<TokenId>, EncodeError> {
        let long = text.len() > PLACE;
        let mut work = self.work();
        work.calls += 1;
        work.now += text.len();
        work.most = work.most.max(work.now);
        if long {
            work.long.push(text.len());
            work.crowded |= work.long.len() > 1 && work.long.iter().sum::<usize>() > PLACES * PLACE;
        }
        if text.starts_with("held") {
            work = self.0.1.wait_while(work, |work| !work.released).expect("no test panics while it holds this");
        } else {
            drop(work);
            std::thread::sleep(Duration::from_millis(10));
            work = self.work();
        }
        work.now -= text.len();
        work.long.retain(|&len| !long || len != text.len());
        drop(work);
        // The tokens themselves are no matter here.
        Bytes.encode(&text[..1], add_special_tokens, parse_special)
    }
    fn decode(&self, ids: &[TokenId], skip_special: bool) -> String {
        Bytes.decode(ids, skip_special)
    }
    fn token_bytes(&self, id: TokenId) -> Vec<u8> {
        Bytes.token_bytes(id)
    }
    fn is_special(&self, id: TokenId) -> bool {
        Bytes.is_special(id)
    }
    fn vocab(&self) -> usize {
        Bytes.vocab()
    }
    fn max_token_bytes(&self) -> Option<usize> {
        None
    }
    fn render(&self, chat: &Chat<'_>) -> Result<Vec<TokenId>, TemplateError> {
        Ok(self.encode(&chat.messages.to_string(), false, true).expect("bytes always encode"))
    }
    fn stream<'a>(&'a self, start: Start, stop: &Stops, include_stop: bool, _: u32) -> Box<dyn TextStream + Send + 'a> {
        Box::new(ByteStream {
            codec: &Bytes,
            trims: start == Start::Alone,
            stop: stop.texts().map(str::to_owned).collect(),
            include_stop,
            held: Vec::new(),
        })
    }
}

fn counting(context: u32) -> (App, Counting) {
    let codec = Counting::default();
    let config = Config { text_threads: PLACES, ..config() };
    (app_of(config, Model { context, codec: Arc::new(codec.clone()), ..model() }), codec)
}

#[tokio::test]
async fn long_texts_share_their_places_and_short_ones_have_their_own() {
    let (app, codec) = counting(1_000_000);
    // Lengths differ, so that the codec can tell them apart.
    let long = (0..8).map(|i| PLACE + 1000 + i).chain((0..3).map(|i| 10 * PLACE + i)).chain((0..4).map(|i| 2 * PLACE + 1000 + i));
    let all: Vec<usize> = long.chain([PLACE / 2; 8]).collect();
    let bodies: Vec<Value> = all.iter().map(|&len| json!({"prompt": "x".repeat(len)})).collect();
    let paths = ["/tokenize", TEXT].into_iter().cycle();
    let answers = futures_util::future::join_all(paths.zip(&bodies).map(|(path, body)| app.post(path, body))).await;
    answers.iter().for_each(|answer| assert_eq!(answer.verdict(), "200"));
    let work = codec.work();
    assert_eq!((work.calls, work.crowded), (all.len(), false), "long texts had more than their places");
    // The longest beside as many short ones as there are threads.
    assert!(work.most <= 10 * PLACE + 2 + PLACES * PLACE, "{} bytes at once", work.most);
}

#[tokio::test]
async fn a_long_text_holds_no_short_one_up() {
    let (app, codec) = counting(1_000_000);
    let held = |len: usize| json!({"prompt": format!("held{}", "x".repeat(len))});
    let (longest, next, short) = (held(10 * PLACE), held(2 * PLACE), json!({"prompt": "x"}));
    let shorts = async {
        // The longest is in work, and the other waits for it.
        while codec.work().calls == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let answer = tokio::time::timeout(Duration::from_secs(5), app.post("/tokenize", &short)).await.expect("it does not wait");
        assert_eq!((answer.verdict().as_str(), codec.work().long.len()), ("200", 1));
        codec.work().released = true;
        codec.0.1.notify_all();
    };
    let (longest, next, ()) = tokio::join!(app.post("/tokenize", &longest), app.post("/tokenize", &next), shorts);
    assert_eq!((longest.verdict().as_str(), next.verdict().as_str()), ("200", "200"));
}

#[tokio::test]
async fn what_no_context_could_hold_is_not_tokenised() {
    let text = |len: usize| json!({"prompt": "x".repeat(len)});
    let call = |len: usize| json!([{"function": {"name": "f", "arguments": "x".repeat(len)}}]);
    let chat = |len: usize| json!({"messages": [{"role": "user", "content": "x".repeat(len)}]});
    let called = |len: usize| json!({"messages": [{"role": "assistant", "content": null, "tool_calls": call(len)}]});
    for (context, path, body, verdict) in [
        (1000, "/tokenize", text(MIB), "200"),
        (1000, "/tokenize", text(MIB + 1), "400 context_length_exceeded prompt"),
        (1000, TEXT, text(MIB + 1), "400 context_length_exceeded prompt"),
        (1000, CHAT, chat(MIB + 1), "400 context_length_exceeded messages"),
        (1000, CHAT, called(MIB), "400 context_length_exceeded messages"),
        (1000, "/tokenize", called(MIB), "400 context_length_exceeded messages"),
        // From 32768 positions on it is 32 bytes for each.
        (40_000, "/tokenize", text(40_000 * 32), "200"),
        (40_000, "/tokenize", text(40_000 * 32 + 1), "400 context_length_exceeded prompt"),
    ] {
        let (app, codec) = counting(context);
        let answer = app.post(path, &body).await;
        assert_eq!(answer.verdict(), verdict, "{context} {path}");
        assert_eq!(codec.work().calls, usize::from(verdict == "200"), "{context} {path}");
    }
    let (app, _) = counting(1000);
    let answer = app.post("/tokenize", &text(MIB + 1)).await.json();
    expect!["prompt has 1048577 bytes of text, and this server tokenises at most 1048576 at once, as this model's maximum context length is 1000 tokens"]
        .assert_eq(answer["error"]["message"].as_str().expect("a message"));
}
