//! Real sockets: deadlines, slow and leaving clients, drains.

use super::*;

struct Net {
    app: App,
    port: u16,
    stop: watch::Sender<bool>,
    served: tokio::task::JoinHandle<strait::server::listen::Drained>,
}

async fn net_with(edit: impl FnOnce(&mut Config), plays: Vec<Play>, drain: Duration) -> Net {
    let mut config = config();
    edit(&mut config);
    let app = app_with(config, plays);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let stop = watch::Sender::new(false);
    let mut stopped = stop.subscribe();
    let shutdown = async move {
        let _ = stopped.wait_for(|s| *s).await;
    };
    let served = tokio::spawn(serve(listener, app.server.clone(), shutdown, drain));
    Net { app, port, stop, served }
}

async fn net(plays: Vec<Play>) -> Net {
    net_with(|_| {}, plays, Duration::from_secs(5)).await
}

impl Net {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(("127.0.0.1", self.port)).await.expect("a connection")
    }
    /// Sends bytes and reads to the end of the connection.
    async fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect().await;
        stream.write_all(bytes).await.expect("sent");
        read_all(&mut stream).await
    }
}

async fn read_all(stream: &mut TcpStream) -> String {
    let mut out = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut out)).await.expect("the connection closes");
    String::from_utf8_lossy(&out).into_owned()
}

async fn read_until(stream: &mut TcpStream, what: &str) -> String {
    let mut out = Vec::new();
    let mut buffer = [0; 4096];
    while !String::from_utf8_lossy(&out).contains(what) {
        let n = tokio::time::timeout(Duration::from_secs(10), stream.read(&mut buffer)).await.expect("bytes come").expect("read");
        assert!(n > 0, "closed before {what}: {}", String::from_utf8_lossy(&out));
        out.extend_from_slice(&buffer[..n]);
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn request(path: &str, body: &Value) -> Vec<u8> {
    let body = body.to_string();
    format!("POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len())
        .into()
}

fn status(reply: &str) -> &str {
    reply.split(' ').nth(1).unwrap_or("closed")
}

#[tokio::test]
async fn a_stream_over_a_socket_keeps_alive_and_ends() {
    let net = net_with(
        |c| c.keep_alive = Duration::from_millis(30),
        vec![Ok(vec![Wait(100), Say("x"), Done(FinishReason::Stop)])],
        Duration::ZERO,
    )
    .await;
    let mut stream = net.connect().await;
    stream.write_all(&request(CHAT, &with(hello(), &json!({"stream": true})))).await.expect("sent");
    let reply = read_until(&mut stream, "[DONE]").await;
    let comments = reply.matches(": keep-alive\n\n").count();
    assert!((1..=4).contains(&comments), "{comments} comments");
    assert!(reply.find(": keep-alive") < reply.find("\"role\""), "comments come while the prompt is waiting");
    assert!(reply.contains("transfer-encoding: chunked") && !reply.contains("\nid:"), "{reply}");
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_sequences_at_once() {
    let (at_once, soon) = (Duration::from_millis(100), Duration::from_secs(2));
    // Behind bytes that nobody reads before the answer is told, the end of the connection is looked for once in a while.
    let next = String::from_utf8(request(CHAT, &hello())).expect("text");
    for (stream, n, steps, behind, within) in [
        (false, 1, vec![Hang], "", at_once),
        (false, 3, vec![Say("a"), Hang], "", at_once),
        (true, 1, vec![Hang], "", at_once),
        (true, 2, vec![Say("a"), Hang], "", at_once),
        (false, 1, vec![Hang], "\r\n", soon),
        (false, 3, vec![Say("a"), Hang], next.as_str(), soon),
        (true, 1, vec![Hang], "\r\n", soon),
        (true, 2, vec![Say("a"), Hang], next.as_str(), soon),
    ] {
        for reset in [false, true] {
            let net = net(vec![Ok(steps.clone()); n]).await;
            let mut client = net.connect().await;
            let mut sent = request(CHAT, &with(hello(), &json!({"stream": stream, "n": n})));
            sent.extend_from_slice(behind.as_bytes());
            client.write_all(&sent).await.expect("sent");
            net.app.fake.submitted(n).await;
            if stream && n == 2 {
                read_until(&mut client, "\"a\"").await;
            }
            assert!(net.app.fake.seen().cancelled.is_empty());
            if reset {
                // Closing with a linger of zero sends RST.
                socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).expect("an option");
            }
            let left = Instant::now();
            drop(client);
            let cancelled = net.app.fake.cancelled(n).await;
            assert_eq!(cancelled.len(), n, "the request behind was not begun");
            for (seq, at) in cancelled {
                let after = at.duration_since(left);
                assert!(after < within, "{seq:?} was cancelled after {after:?}, with {behind:?} behind its request");
            }
        }
    }
}

#[tokio::test]
async fn slow_clients_are_cut_off() {
    let edit = |c: &mut Config| {
        c.limits.header_deadline = Duration::from_millis(150);
        c.limits.body_deadline = Duration::from_millis(150);
    };
    let net = net_with(edit, vec![], Duration::from_secs(5)).await;
    let half_body =
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{\"mo";
    let chunked =
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{\"\r\n";
    let answered = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n";
    for (bytes, want) in [
        (&b""[..], "closed"),
        (b"GET /health HTTP/1.1\r\nhost: loc", "closed"),
        (half_body, "408"),
        (chunked, "408"),
        // A connection that is idle after an answer.
        (answered, "200"),
    ] {
        let begun = Instant::now();
        let reply = net.raw(bytes).await;
        let took = begun.elapsed();
        assert_eq!(status(&reply), want, "{}: {reply}", String::from_utf8_lossy(bytes));
        assert!(took > Duration::from_millis(100) && took < Duration::from_secs(3), "{took:?}");
        if want == "408" {
            assert!(reply.contains("\"request_timeout\"") && reply.contains("connection: close"), "{reply}");
        }
    }
    // A body that trickles does not extend its time.
    let mut client = net.connect().await;
    client.write_all(half_body).await.expect("sent");
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(2) && client.write_all(b" ").await.is_ok() {
        tokio::time::sleep(Duration::from_millis(10)).await;
        if net.app.server.telemetry.render().contains("code=\"request_timeout\"} 3") {
            break;
        }
    }
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn large_bodies_are_refused_early() {
    let net = net_with(|c| c.limits.body_bytes = 1000, vec![], Duration::from_secs(5)).await;
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n";
    // Announced: refused before a byte of it is sent.
    let reply = net.raw(format!("{head}content-length: 1001\r\n\r\n").as_bytes()).await;
    assert!(status(&reply) == "413" && reply.contains("\"body_too_large\"") && reply.contains("connection: close"), "{reply}");
    // Not announced: refused when it crosses the limit.
    let chunk = format!("300\r\n{}\r\n", "x".repeat(0x300));
    let reply = net.raw(format!("{head}transfer-encoding: chunked\r\n\r\n{chunk}{chunk}").as_bytes()).await;
    assert_eq!(status(&reply), "413", "{reply}");
    let body = json!({"prompt": "x", "user": "y".repeat(500)});
    let mut client = net.connect().await;
    client.write_all(&request(TEXT, &body)).await.expect("sent");
    assert_eq!(status(&read_until(&mut client, "usage").await), "200");
}

#[tokio::test]
async fn a_refusal_reaches_a_client_that_sends_all_of_its_body_first() {
    let edit = |c: &mut Config| (c.limits.body_bytes, c.api_keys) = (1000, Keys::new(["sk-one"]));
    let net = net_with(edit, vec![], Duration::from_secs(5)).await;
    let body = vec![b'x'; 32 << 20];
    for (path, header, want) in [
        (TEXT, "content-type: application/json\r\nx-api-key: sk-one", "413"),
        (TEXT, "content-type: text/plain\r\nx-api-key: sk-one", "415"),
        (TEXT, "content-type: application/json", "401"),
        ("/v1/embeddings", "content-type: application/json\r\nx-api-key: sk-one", "501"),
        ("/nope", "x-api-key: sk-one", "404"),
    ] {
        let mut client = net.connect().await;
        let head = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\n{header}\r\ncontent-length: {}\r\n\r\n", body.len());
        client.write_all(head.as_bytes()).await.expect("sent");
        client.write_all(&body).await.unwrap_or_else(|error| panic!("{path} {header}: {error}"));
        assert_eq!(status(&read_all(&mut client).await), want, "{path} {header}");
    }
    // Nobody is waited for who sends nothing, nor when the server closes.
    let begun = Instant::now();
    let mut silent = net.connect().await;
    silent.write_all(b"POST /nope HTTP/1.1\r\nhost: localhost\r\nx-api-key: sk-one\r\ncontent-length: 9\r\n\r\n").await.expect("sent");
    assert_eq!(status(&read_all(&mut silent).await), "404");
    net.stop.send_replace(true);
    assert_eq!(net.served.await.expect("no panic").forced, 0);
    assert!(begun.elapsed() < Duration::from_millis(900), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_wrong_key_costs_no_body() {
    let net = net_with(|c| c.api_keys = Keys::new(["sk-one"]), vec![], Duration::from_secs(5)).await;
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nexpect: 100-continue\r\ncontent-length: 1000000\r\n\r\n";
    let reply = net.raw(head.as_bytes()).await;
    assert!(reply.starts_with("HTTP/1.1 401") && !reply.contains("100 Continue"), "{reply}");
}

#[tokio::test]
async fn requests_that_proxies_would_read_differently() {
    let net = net(vec![]).await;
    let json = "content-type: application/json\r\n";
    let close = "connection: close\r\n";
    for (bytes, want) in [
        (format!("GET /health HTTP/1.1\r\n{close}\r\n"), "400"),
        (format!("GET /health HTTP/1.0\r\n{close}\r\n"), "400"),
        (format!("GET /health HTTP/1.1\r\nhost: a\r\nhost: a\r\n{close}\r\n"), "400"),
        (format!("GET /health HTTP/1.1\r\nhost: a/?#@b\r\n{close}\r\n"), "400"),
        (format!("GET http://b/health HTTP/1.1\r\nhost: a\r\n{close}\r\n"), "400"),
        (format!("GET http://a/health HTTP/1.1\r\nhost: a\r\n{close}\r\n"), "200"),
        (format!("CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\n{close}\r\n"), "405"),
        (format!("GET /health HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\n{close}\r\n"), "200"),
        (format!("POST /tokenize HTTP/1.1\r\nhost: a\r\n{json}content-length: 2\r\ncontent-length: 3\r\n\r\n{{}}"), "400"),
        (format!("POST /tokenize HTTP/1.1\r\nhost: a\r\n{json}content-length: +2\r\n\r\n{{}}"), "400"),
        (format!("POST /tokenize HTTP/1.1\r\nhost: a\r\n{json}content-length: 2, 2\r\n\r\n{{}}"), "400"),
        (format!("POST /tokenize HTTP/1.1\r\nhost: a\r\n{json}transfer-encoding: xchunked\r\n\r\n"), "400"),
        (format!("POST /tokenize HTTP/1.1\r\nhost: a\r\n{json}transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n"), "400"),
        (format!("GET /health HTTP/1.1\r\nhost : a\r\n{close}\r\n"), "400"),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(), "400"),
        (format!("GET /health HTTP/1.1\r\nhost: a\r\n{}{close}\r\n", "x: y\r\n".repeat(70)), "431"),
        (format!("GET /health HTTP/1.1\r\nhost: a\r\nx: {}\r\n{close}\r\n", "y".repeat(40_000)), "431"),
    ] {
        let reply = net.raw(bytes.as_bytes()).await;
        // A stream that is no HTTP at all may also just be closed.
        let got = status(&reply);
        assert!(got == want || (bytes.starts_with("PRI") && got == "closed"), "{bytes:.200}: {reply:.300}");
    }
    // TE and CL: taken as chunked, and the connection does not serve what follows.
    let smuggled = format!(
        "POST /tokenize HTTP/1.1\r\nhost: a\r\n{json}content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /version HTTP/1.1\r\nhost: a\r\n\r\n"
    );
    let reply = net.raw(smuggled.as_bytes()).await;
    assert_eq!(reply.matches("HTTP/1.1 ").count(), 1, "{reply}");
    // Pipelined requests are answered in order.
    let pipelined = format!("{}GET /version HTTP/1.1\r\nhost: a\r\n{close}\r\n", "GET /health HTTP/1.1\r\nhost: a\r\n\r\n".repeat(9));
    let reply = net.raw(pipelined.as_bytes()).await;
    assert_eq!((reply.matches("HTTP/1.1 200").count(), reply.matches("{\"status\":\"ok\"}").count()), (10, 9));
    assert!(
        reply.trim_end().ends_with('}') && reply.rfind("version").expect("the last answer") > reply.rfind("status").expect("the ninth")
    );
}

#[tokio::test]
async fn connections_beyond_the_cap_wait_their_turn() {
    let net = net_with(|c| c.limits.connections = 2, vec![], Duration::from_secs(5)).await;
    let mut held = vec![net.connect().await, net.connect().await];
    for client in &mut held {
        client.write_all(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("sent");
        read_until(client, "ok").await;
    }
    let mut third = net.connect().await;
    third.write_all(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("sent");
    let mut buffer = [0; 16];
    assert!(tokio::time::timeout(Duration::from_millis(100), third.read(&mut buffer)).await.is_err(), "no slot yet");
    held.pop();
    read_until(&mut third, "ok").await;
}

#[tokio::test]
async fn a_drain_lets_streams_end() {
    let net = net(vec![Ok(vec![Say("a"), Wait(200), Say("b"), Done(FinishReason::Stop)])]).await;
    let mut idle = net.connect().await;
    idle.write_all(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("sent");
    read_until(&mut idle, "ok").await;
    let mut client = net.connect().await;
    client.write_all(&request(CHAT, &with(hello(), &json!({"stream": true})))).await.expect("sent");
    read_until(&mut client, "\"a\"").await;
    net.stop.send_replace(true);
    assert_eq!(read_all(&mut idle).await, "", "an idle connection closes at once");
    assert!(TcpStream::connect(("127.0.0.1", net.port)).await.is_err(), "nothing more is accepted");
    assert!(net.app.server.phase() >= Phase::Draining);
    let rest = read_all(&mut client).await;
    assert!(rest.contains("\"b\"") && rest.contains("[DONE]"), "{rest}");
    assert_eq!(net.served.await.expect("no panic").forced, 0);
    assert_eq!(net.app.server.phase(), Phase::Stopping);
}

#[tokio::test]
async fn a_drain_that_takes_too_long_ends_streams_with_an_error() {
    for hurried in [false, true] {
        let drain = if hurried { Duration::from_secs(60) } else { Duration::from_millis(100) };
        let net = net_with(|_| {}, vec![Ok(vec![Say("a"), Hang]), Ok(vec![Hang])], drain).await;
        let mut client = net.connect().await;
        client.write_all(&request(CHAT, &with(hello(), &json!({"stream": true})))).await.expect("sent");
        read_until(&mut client, "\"a\"").await;
        let mut plain = net.connect().await;
        plain.write_all(&request(CHAT, &hello())).await.expect("sent");
        net.app.fake.submitted(2).await;
        let begun = Instant::now();
        net.stop.send_replace(true);
        if hurried {
            // What a second signal does.
            net.app.server.reached(Phase::Draining).await;
            net.app.server.stop();
        }
        let rest = read_all(&mut client).await;
        assert!(rest.contains("\"code\":\"draining\"") && !rest.contains("[DONE]"), "{rest}");
        assert_eq!(status(&read_all(&mut plain).await), "503");
        assert_eq!(net.served.await.expect("no panic").forced, 2);
        assert!(begun.elapsed() < Duration::from_secs(3));
        assert!(net.app.server.telemetry.render().contains("strait:drain_forced_total 2\n"));
    }
}

#[tokio::test]
async fn a_stop_without_a_drain_ends_streams_with_an_error() {
    let net = net(vec![Ok(vec![Say("a"), Hang])]).await;
    let mut client = net.connect().await;
    client.write_all(&request(CHAT, &with(hello(), &json!({"stream": true})))).await.expect("sent");
    read_until(&mut client, "\"a\"").await;
    // What an engine that ends unasked does: no signal came, and connections are still accepted.
    net.app.server.stop();
    let rest = read_all(&mut client).await;
    assert!(rest.contains("\"code\":\"draining\"") && !rest.contains("[DONE]"), "{rest}");
    assert_eq!(net.served.await.expect("no panic").forced, 1);
}

#[tokio::test]
async fn a_reader_that_stalls_holds_little() {
    const ALL: usize = 200_000;
    let net = net(vec![Ok(vec![Say(Box::leak("y".repeat(ALL).into_boxed_str())), Done(FinishReason::Stop)])]).await;
    let client = tokio::net::TcpSocket::new_v4().expect("a socket");
    client.set_recv_buffer_size(4096).expect("an option");
    let mut client = client.connect(format!("127.0.0.1:{}", net.port).parse().expect("an address")).await.expect("a connection");
    client.write_all(&request(CHAT, &with(hello(), &json!({"stream": true, "max_tokens": 900})))).await.expect("sent");
    net.app.fake.submitted(1).await;
    // Nothing is read: once buffers are full the body is not polled any further, and the sequence still runs. Quiet for 100 ms twice,
    // as a machine that stalls looks quiet once.
    let (mut said, mut quiet) = (0, 0);
    let begun = Instant::now();
    while quiet < 2 {
        assert!(begun.elapsed() < Duration::from_secs(10), "{said} tokens were taken of a reader that takes nothing, and more are");
        tokio::time::sleep(Duration::from_millis(100)).await;
        let now = net.app.fake.said.load(Ordering::Relaxed);
        quiet = if now == said { quiet + 1 } else { 0 };
        said = now;
    }
    // What the engine's channel and the sockets' buffers hold, at more than 150 bytes an event.
    assert!((64..ALL / 20).contains(&said), "{said} tokens were taken");
    assert!(net.app.fake.seen().cancelled.is_empty());
    drop(client);
    net.app.fake.cancelled(1).await;
}
