//! Answers to requests that cannot be met.

use axum::Json;
use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use berth_api::types::{ApiError, ErrorCode};

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
#[derive(FromRequest)]
#[from_request(via(Json), rejection(Failure))]
pub struct Body<T>(pub T);

/// Parameters in the path.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Path), rejection(Failure))]
pub struct Path<T>(pub T);

/// Parameters after the path.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Query), rejection(Failure))]
pub struct Query<T>(pub T);
