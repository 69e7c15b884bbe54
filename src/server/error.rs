//! Every failure to a status, OpenAI's error object and its headers. Statuses are decided here and nowhere else.

use std::borrow::Cow;
use std::time::Duration;

use axum::http::header::{CONNECTION, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde::Serialize;
use utoipa::ToSchema;

use crate::adapters::{AdapterError, Fault};
use crate::admission::Refusal;
use crate::engine::{Limit, SubmitError};
use crate::request::Failure;
use crate::telemetry::Full;

/// Longest message a client gets, in characters.
const MESSAGE_MAX: usize = 300;
/// Longest part of a template's own complaint.
const TEMPLATE_MAX: usize = 200;

/// An answer that is not the one asked for. The message names places and numbers, never the client's content.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    pub status: StatusCode,
    pub kind: &'static str,
    pub code: &'static str,
    pub param: Option<String>,
    pub message: Cow<'static, str>,
    /// How long to wait before trying again.
    pub retry_after: Option<Duration>,
    /// Repeating the same request cannot help, whatever the status suggests.
    pub hopeless: bool,
    /// The request was not read to its end, so the connection cannot be used again.
    pub close: bool,
    /// What had no room for it.
    pub full: Option<Full>,
}

/// The body of every reply that is not a success.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorBody {
    pub error: ErrorObject,
}

/// OpenAI's error object.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorObject {
    /// At most 300 characters.
    pub message: String,
    #[serde(rename = "type")]
    pub kind: String,
    /// The field that is at fault.
    pub param: Option<String>,
    /// Stable.
    pub code: Option<String>,
}

/// Marks a reply as a refusal, for the one place that counts them: its code, and what was full.
#[derive(Clone, Copy, Debug)]
pub struct Refused(pub &'static str, pub Option<Full>);

const INVALID: &str = "invalid_request_error";
const SERVER: &str = "server_error";

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: &'static str, message: impl Into<Cow<'static, str>>) -> Self {
        let message = message.into();
        ApiError { status, kind, code, param: None, message, retry_after: None, hopeless: false, close: false, full: None }
    }

    fn closing(mut self) -> Self {
        self.close = true;
        self
    }

    fn after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// No such route.
    pub fn not_found() -> Self {
        Self::new(StatusCode::NOT_FOUND, INVALID, "not_found", "there is no such path; /docs lists the paths")
    }

    /// The route exists, the method does not; `Allow` is added by the router, which knows the others.
    pub fn method_not_allowed() -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            INVALID,
            "method_not_allowed",
            "this path does not take this method; see the Allow header",
        )
    }

    /// A path of the API that this version does not serve.
    pub fn not_implemented() -> Self {
        let message = "this part of the API is not served by this version";
        ApiError { hopeless: true, ..Self::new(StatusCode::NOT_IMPLEMENTED, INVALID, "not_implemented", message) }
    }

    /// No key, or one we do not know. The same for all of them.
    pub fn invalid_api_key() -> Self {
        let message = "a valid API key is needed: send it as `Authorization: Bearer KEY`";
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", "invalid_api_key", message).closing()
    }

    /// Known, but not allowed to do this.
    pub fn not_allowed(message: &'static str) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", "not_allowed", message)
    }

    /// A header that cannot be taken at its word.
    pub fn bad_header(name: &'static str, message: &'static str) -> Self {
        let error = Self::new(StatusCode::BAD_REQUEST, INVALID, "invalid_value", message).closing();
        ApiError { param: Some(name.to_owned()), ..error }
    }

    /// `Host` is missing, repeated, malformed, or contradicts the request target.
    pub fn bad_host() -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            INVALID,
            "bad_host",
            "exactly one valid Host header is needed, equal to the request target's authority",
        )
        .closing()
    }

    /// A body of another type than JSON, or a compressed one.
    pub fn unsupported_media_type(message: &'static str) -> Self {
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, INVALID, "unsupported_media_type", message).closing()
    }

    /// The body exceeds the limit.
    pub fn body_too_large(limit: usize) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID, "body_too_large", format!("the body is larger than {limit} bytes")).closing()
    }

    /// The client sends too slowly.
    pub fn request_timeout() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "timeout_error", "request_timeout", "the body did not arrive in time").closing()
    }

    /// The body broke off or was framed wrongly.
    pub fn broken_body() -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID, "invalid_json", "the body could not be read to its end").closing()
    }

    /// No place to work on it now, as `full` has none.
    pub fn overloaded(full: Full, wait: Duration) -> Self {
        let message = "the server is at its limit of requests; try again after the time in Retry-After";
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "server_overloaded", message).after(wait);
        ApiError { full: Some(full), ..error }
    }

    /// What the engine says to a request.
    pub fn not_submitted(error: &SubmitError) -> Self {
        match *error {
            SubmitError::QueueFull { limit, retry_after, .. } => {
                let full = match limit {
                    Limit::Tokens => Full::Tokens,
                    Limit::Requests => Full::Requests,
                };
                ApiError { message: error.to_string().into(), ..Self::overloaded(full, retry_after) }
            }
            SubmitError::TooLarge { .. } => Self::new(StatusCode::BAD_REQUEST, INVALID, "context_length_exceeded", error.to_string()),
            SubmitError::Draining => Self::draining(),
            SubmitError::Stopped => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER, "engine_stopped", error.to_string()).after(Duration::from_secs(5))
            }
        }
    }

    /// The model is still being loaded.
    pub fn not_ready() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER, "not_ready", "the model is being loaded").after(Duration::from_secs(2))
    }

    /// The server takes no more requests.
    pub fn draining() -> Self {
        let message = "the server is shutting down and takes no new requests";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER, "draining", message).after(Duration::from_secs(5))
    }

    /// The engine gives no sign of life.
    pub fn stalled(age: Duration) -> Self {
        let message = format!("the engine has given no sign of life for {} seconds", age.as_secs());
        Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER, "engine_stalled", message).after(Duration::from_secs(5))
    }

    /// Our fault; what happened is in the log.
    pub fn internal() -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER, "internal_error", "the server failed on this request")
    }

    /// The error object, as bodies and streams carry it.
    pub fn body(&self) -> ErrorBody {
        ErrorBody {
            error: ErrorObject {
                message: shorten(&self.message, MESSAGE_MAX),
                kind: self.kind.to_owned(),
                param: self.param.clone(),
                code: Some(self.code.to_owned()),
            },
        }
    }
}

/// At most `max` characters, none of them a control character.
fn shorten(text: &str, max: usize) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(max).collect()
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let code = match &refusal {
            Refusal::Json { .. } => "invalid_json",
            Refusal::Type { .. } => "invalid_type",
            Refusal::Value { .. } => "invalid_value",
            Refusal::Unsupported { .. } => "unsupported_parameter",
            Refusal::ContextLength { .. } | Refusal::TextLength { .. } => "context_length_exceeded",
            Refusal::Template { .. } => "template_error",
            Refusal::UnknownModel => {
                let error = Self::new(StatusCode::NOT_FOUND, INVALID, "model_not_found", refusal.to_string());
                return ApiError { param: Some("model".to_owned()), ..error };
            }
        };
        let message = match &refusal {
            Refusal::Template { message } => Refusal::Template { message: shorten(message, TEMPLATE_MAX) }.to_string(),
            other => other.to_string(),
        };
        let param = match refusal {
            Refusal::Type { param, .. } | Refusal::Value { param, .. } | Refusal::Unsupported { param, .. } => Some(param),
            Refusal::ContextLength { param, .. } | Refusal::TextLength { param, .. } => Some(param.to_owned()),
            Refusal::Template { .. } => Some("messages".to_owned()),
            Refusal::Json { .. } | Refusal::UnknownModel => None,
        };
        let param = param.filter(|p| !p.is_empty());
        ApiError { param, ..Self::new(StatusCode::BAD_REQUEST, INVALID, code, message) }
    }
}

impl From<AdapterError> for ApiError {
    fn from(error: AdapterError) -> Self {
        let (status, kind) = match error.fault() {
            Fault::NotFound => (StatusCode::NOT_FOUND, INVALID),
            Fault::Forbidden => (StatusCode::FORBIDDEN, "permission_error"),
            Fault::Invalid => (StatusCode::BAD_REQUEST, INVALID),
            Fault::Conflict => (StatusCode::CONFLICT, INVALID),
            Fault::Busy => (StatusCode::SERVICE_UNAVAILABLE, SERVER),
            Fault::Server => (StatusCode::INTERNAL_SERVER_ERROR, SERVER),
        };
        let new = Self::new(status, kind, error.code(), error.to_string());
        if error.fault() == Fault::Busy { new.after(Duration::from_secs(2)) } else { new }
    }
}

impl ApiError {
    /// Why a request failed that wore `adapter`, which is the first to be suspected of numbers that overflow.
    pub(super) fn failed(failure: &Failure, adapter: Option<&str>) -> Self {
        match (failure, adapter) {
            (Failure::Numerical, Some(name)) => {
                let message = format!(
                    "the model produced numbers that are not finite under the adapter {name:?}; where the model alone answers, the adapter's training diverged"
                );
                ApiError { message: message.into(), ..failure.into() }
            }
            _ => failure.into(),
        }
    }
}

impl From<&Failure> for ApiError {
    fn from(failure: &Failure) -> Self {
        let unavailable = |code, message| Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER, code, message).after(Duration::from_secs(5));
        match failure {
            Failure::Numerical => {
                let message = "the model produced numbers that are not finite";
                ApiError { hopeless: true, ..Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER, "numerical_error", message) }
            }
            Failure::OutOfPages => {
                unavailable("out_of_pages", "the request outgrew the cache; shorten it or choose a smaller cache_profile")
            }
            Failure::QueueTimeout => unavailable("deadline_exceeded", "the request waited too long in the queue"),
            // What failed is for the log; the client can do nothing with it.
            Failure::Internal(_) => Self::internal(),
            Failure::Draining => Self::draining(),
            Failure::Unread => {
                let message = "the client read more slowly than tokens came, and too many waited for it; the request was cancelled";
                Self::new(StatusCode::REQUEST_TIMEOUT, "timeout_error", "client_too_slow", message)
            }
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = serde_json::to_vec(&self.body()).unwrap_or_default();
        let mut response = Response::new(axum::body::Body::from(Bytes::from(body)));
        *response.status_mut() = self.status;
        response.extensions_mut().insert(Refused(self.code, self.full));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(wait) = self.retry_after {
            // Whole seconds, rounded up: a client that waits so long is not early.
            let seconds = wait.as_millis().div_ceil(1000).max(1);
            let ms = wait.as_millis().max(1);
            headers.insert(RETRY_AFTER, HeaderValue::from_str(&seconds.to_string()).expect("digits are a header value"));
            headers.insert(
                HeaderName::from_static("retry-after-ms"),
                HeaderValue::from_str(&ms.to_string()).expect("digits are a header value"),
            );
        }
        if self.hopeless {
            headers.insert(HeaderName::from_static("x-should-retry"), HeaderValue::from_static("false"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if self.close {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_told_in_whole_seconds_and_in_milliseconds() {
        for (ms, seconds, millis) in
            [(0, "1", "1"), (1, "1", "1"), (999, "1", "999"), (1000, "1", "1000"), (1001, "2", "1001"), (90_500, "91", "90500")]
        {
            let response = ApiError::overloaded(Full::Texts, Duration::from_millis(ms)).into_response();
            assert_eq!(response.headers()["retry-after"], seconds);
            assert_eq!(response.headers()["retry-after-ms"], millis);
        }
    }

    #[test]
    fn messages_are_short_and_one_line() {
        let refusal = Refusal::Template { message: format!("a\nb\u{1b}[31m{}", "x".repeat(500)) };
        let body = ApiError::from(refusal).body();
        assert!(body.error.message.chars().count() <= MESSAGE_MAX);
        assert!(!body.error.message.chars().any(char::is_control));
        assert!(body.error.message.starts_with("the chat template refused the messages: a b [31mxxx"), "{}", body.error.message);
    }

    #[test]
    fn an_internal_failure_tells_the_client_nothing() {
        let error = ApiError::from(&Failure::Internal("secret path /x".into()));
        assert!(!error.message.contains("secret"));
    }
}
