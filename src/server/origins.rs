//! Which web pages of other origins may use this server: what a browser asks before it lets one send JSON or a key (a preflight), and what
//! it wants to see on every answer. Nothing here keeps anybody out who is no browser: that is for keys.

use axum::http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS,
    ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD, ORIGIN, VARY,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::response::{IntoResponse, Response};

/// Origins whose pages may use the server; none by default.
#[derive(Clone, Debug, Default)]
pub struct Origins {
    any: bool,
    listed: Vec<HeaderValue>,
}

impl Origins {
    /// From origins as browsers send them; `*` is any.
    pub fn new<S: AsRef<str>>(origins: impl IntoIterator<Item = S>) -> Self {
        let mut it = Origins::default();
        for origin in origins {
            match origin.as_ref() {
                "*" => it.any = true,
                origin => it.listed.extend(HeaderValue::from_str(origin)),
            }
        }
        it
    }

    /// What to call the origin of a request in its answer, if pages of that origin may use the server.
    pub(super) fn admit(&self, request: &HeaderMap) -> Option<HeaderValue> {
        let origin = request.get(ORIGIN)?;
        if self.any {
            return Some(HeaderValue::from_static("*"));
        }
        self.listed.contains(origin).then(|| origin.clone())
    }

    /// Lets a page of the `admitted` origin read an answer.
    pub(super) fn mark(&self, admitted: Option<HeaderValue>, answer: &mut HeaderMap) {
        if !self.any && !self.listed.is_empty() {
            answer.append(VARY, HeaderValue::from_static("origin"));
        }
        if let Some(origin) = admitted {
            answer.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
            let exposed = HeaderValue::from_static("x-request-id, retry-after, retry-after-ms, x-should-retry");
            answer.insert(ACCESS_CONTROL_EXPOSE_HEADERS, exposed);
        }
    }
}

/// Whether a browser asks what a page may send.
pub(super) fn is_preflight(method: &Method, request: &HeaderMap) -> bool {
    *method == Method::OPTIONS && request.contains_key(ACCESS_CONTROL_REQUEST_METHOD)
}

/// What a page that may use the server may send it.
pub(super) fn preflight(request: &HeaderMap) -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    let headers = response.headers_mut();
    headers.insert(ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, HEAD, POST"));
    // As they are asked for: clients send many of their own, and `*` would leave out Authorization.
    headers.extend(request.get(ACCESS_CONTROL_REQUEST_HEADERS).map(|asked| (ACCESS_CONTROL_ALLOW_HEADERS, asked.clone())));
    headers.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
    // A page from the internet asks this before it reaches a machine of the local network.
    if request.contains_key("access-control-request-private-network") {
        headers.insert(HeaderName::from_static("access-control-allow-private-network"), HeaderValue::from_static("true"));
    }
    response
}
