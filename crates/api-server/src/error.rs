//! Answers to requests that cannot be met.

use axum::Json;
use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use berth_api::types::{ApiError, ErrorCode};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// An error, with the HTTP status that it has.
#[derive(Debug)]
pub struct Failure {
    status: StatusCode,
    error: ApiError,
}

/// What a handler returns.
pub type Answer<T> = Result<T, Failure>;

impl Failure {
    fn new(status: StatusCode, code: ErrorCode, message: impl Into<String>) -> Self {
        Self { status, error: ApiError { code, message: message.into() } }
    }

    /// 400: the request makes no sense.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, ErrorCode::BadRequest, message)
    }

    /// 403.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, ErrorCode::Forbidden, message)
    }

    /// 404.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, ErrorCode::NotFound, message)
    }

    /// 409: not in this state.
    pub fn wrong_state(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, ErrorCode::WrongState, message)
    }

    /// 409: not with this VM.
    pub fn not_possible(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, ErrorCode::NotPossible, message)
    }

    /// 422: the body is JSON, and makes no sense.
    pub fn unprocessable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, ErrorCode::BadRequest, message)
    }

    /// 426.
    pub fn upgrade_required(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UPGRADE_REQUIRED, ErrorCode::UpgradeRequired, message)
    }

    /// The machine ended while it was asked.
    pub fn ended() -> Self {
        Self::wrong_state("the VM has ended")
    }

    /// No route.
    pub async fn no_route() -> Self {
        Self::not_found("there is no such route: GET /openapi.json describes all")
    }

    /// No such method of a route.
    pub async fn no_method() -> Self {
        let message = "this route does not have this method: GET /openapi.json describes all";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, ErrorCode::MethodNotAllowed, message)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.status, Json(self.error)).into_response()
    }
}

impl From<JsonRejection> for Failure {
    fn from(rejection: JsonRejection) -> Self {
        let code = match rejection.status() {
            StatusCode::UNPROCESSABLE_ENTITY => ErrorCode::BadRequest,
            _ => ErrorCode::BadBody,
        };
        Self::new(rejection.status(), code, rejection.body_text())
    }
}

impl From<PathRejection> for Failure {
    fn from(rejection: PathRejection) -> Self {
        Self::bad_request(rejection.body_text())
    }
}

impl From<QueryRejection> for Failure {
    fn from(rejection: QueryRejection) -> Self {
        Self::bad_request(rejection.body_text())
    }
}

/// A JSON body; see [`Failure`] for what is none.
pub struct Body<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Answer<Self> {
        // serde would also take an array for an object, which the OpenAPI document does not allow.
        let Json(mut object) = Json::<serde_json::Map<String, Value>>::from_request(request, state).await?;
        object.values_mut().for_each(write_whole);
        let body = serde_json::from_value(Value::Object(object));
        body.map(Self).map_err(|e| Failure::unprocessable(e.to_string()))
    }
}

/// A whole number that JSON wrote as `5.0` is one (JSON Schema, Validation, 6.1.1), which serde does not know.
fn write_whole(value: &mut Value) {
    /// Above it a floating-point number does not name one whole number.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    let float = value.as_f64().filter(|_| value.is_f64());
    if let Some(f) = float.filter(|f| f.fract() == 0.0 && (0.0..=EXACT).contains(f)) {
        *value = Value::from(f as u64);
    }
}

/// Parameters in the path.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Path), rejection(Failure))]
pub struct Path<T>(pub T);

/// Parameters after the path.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Query), rejection(Failure))]
pub struct Query<T>(pub T);

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn whole_numbers_may_be_written_with_a_point() {
        let written = |mut value: Value| {
            write_whole(&mut value);
            value
        };
        assert_eq!(written(json!(80.0)), json!(80));
        for other in [json!(80.5), json!(-1.0), json!(1e300), json!(u64::MAX), json!("80.0"), json!(null)] {
            assert_eq!(written(other.clone()), other);
        }
    }
}
