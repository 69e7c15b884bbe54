//! Requests to a server over HTTP/1.1, one connection each: the simplest thing that cannot mix up two answers.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::header::{CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Request, Response, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::ask::{AskError, Body, Sending, Transport};

/// How long a server may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(10);

/// A server at an `http://` address.
#[derive(Clone, Debug)]
pub struct Http {
    /// Host and port to connect to.
    address: String,
    /// As the `Host` header has it.
    host: HeaderValue,
    /// What stands before the API's own paths; empty, or begins with a slash and does not end with one.
    base: String,
    url: String,
}

impl Http {
    /// The server at `url`: `http://host[:port][/path]`, with or without the `/v1` that clients of the API are configured with.
    ///
    /// # Errors
    /// [`AskError::Url`] for anything else; https among it.
    pub fn new(url: &str) -> Result<Http, AskError> {
        let bad = |reason: &'static str| AskError::Url { url: url.to_owned(), reason };
        let uri: Uri = url.parse().map_err(|_| bad("it is not a URL"))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => return Err(bad("TLS is not built in; put a local proxy in front of that server")),
            _ => return Err(bad("it does not begin with http://")),
        }
        let authority = uri.authority().ok_or_else(|| bad("it names no host"))?;
        if authority.as_str().contains('@') {
            return Err(bad("it holds a user name; give a key with --api-key"));
        }
        if uri.query().is_some() {
            return Err(bad("it has a query"));
        }
        let base = uri.path().trim_end_matches('/');
        let base = base.strip_suffix("/v1").unwrap_or(base);
        let host = HeaderValue::from_str(authority.as_str()).map_err(|_| bad("its host is no name"))?;
        let address = format!("{}:{}", authority.host(), authority.port_u16().unwrap_or(80));
        Ok(Http { address, host, base: base.to_owned(), url: url.to_owned() })
    }
}

impl Transport for Http {
    fn send(&self, mut request: Request<Full<Bytes>>) -> Sending {
        let this = self.clone();
        Box::pin(async move {
            let lost = |reason: String| AskError::Lost { url: this.url.clone(), reason };
            let connecting = tokio::time::timeout(CONNECT, TcpStream::connect(&this.address)).await;
            let stream = match connecting {
                Err(_) => return Err(lost("no answer to a connection".into())),
                Ok(Err(error)) => return Err(lost(error.to_string())),
                Ok(Ok(stream)) => stream,
            };
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| lost(e.to_string()))?;
            // Ends with the response's body, or when that is dropped.
            tokio::spawn(connection);
            let path = format!("{}{}", this.base, request.uri().path());
            *request.uri_mut() = path.parse().map_err(|_| lost("its path is none".into()))?;
            request.headers_mut().insert(HOST, this.host.clone());
            let response: Response<_> = sender.send_request(request).await.map_err(|e| lost(e.to_string()))?;
            Ok(response.map(|body| -> Body { body.map_err(Into::into).boxed_unsync() }))
        })
    }
}

/// A request of the API; `path` begins with a slash.
pub(super) fn request(path: &str, body: Option<&serde_json::Value>, key: Option<&str>) -> Result<Request<Full<Bytes>>, AskError> {
    let builder = Request::builder().uri(path).method(if body.is_some() { "POST" } else { "GET" });
    let builder = builder.header(HOST, "localhost").header(CONTENT_TYPE, "application/json");
    let builder = match key {
        Some(key) => builder.header("authorization", format!("Bearer {key}")),
        None => builder,
    };
    let bytes = body.map_or_else(Bytes::new, |value| Bytes::from(value.to_string()));
    builder.body(Full::new(bytes)).map_err(|_| AskError::Key)
}
