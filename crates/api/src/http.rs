//! HTTP/1.1 on a Unix socket, one request a connection.

use std::path::Path;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, CONNECTION, CONTENT_TYPE, HOST, UPGRADE};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use crate::client::ClientError;
use crate::types::ApiError;

/// Most bytes of an answer that is read whole.
const MAX_BODY: usize = 64 << 20;

/// A request.
pub struct Ask<'a> {
    pub method: Method,
    pub path: &'a str,
    /// JSON.
    pub body: Option<Vec<u8>>,
    /// The protocol that the connection is to change to.
    pub upgrade: Option<&'static str>,
}

impl<'a> Ask<'a> {
    pub fn new(method: Method, path: &'a str) -> Self {
        Self { method, path, body: None, upgrade: None }
    }
}

/// Sends the request, and returns the answer if it is no error.
///
/// # Errors
/// [`ClientError`].
pub async fn send(socket: &Path, ask: Ask<'_>) -> Result<Response<Incoming>, ClientError> {
    let connection = crate::runtime::socket::connect(socket)
        .and_then(|stream| {
            stream.set_nonblocking(true)?;
            UnixStream::from_std(stream)
        })
        .map_err(|source| ClientError::Connect { socket: socket.to_owned(), source })?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(connection)).await?;
    tokio::spawn(connection.with_upgrades());
    let mut request = Request::builder().method(ask.method).uri(ask.path).header(HOST, "berth");
    if let Some(protocol) = ask.upgrade {
        request = request.header(CONNECTION, "upgrade").header(UPGRADE, protocol);
    } else {
        request = request.header(ACCEPT, "application/json");
    }
    if ask.body.is_some() {
        request = request.header(CONTENT_TYPE, "application/json");
    }
    let request = request
        .body(Full::new(Bytes::from(ask.body.unwrap_or_default())))
        .map_err(|e| ClientError::Answer(e.to_string()))?;
    let answer = sender.send_request(request).await?;
    let status = answer.status();
    if status.is_success() || status == StatusCode::SWITCHING_PROTOCOLS {
        return Ok(answer);
    }
    let body = whole(answer).await?;
    Err(match serde_json::from_slice::<ApiError>(&body) {
        Ok(error) => ClientError::Refused { status: status.as_u16(), error },
        Err(_) => ClientError::Answer(format!("{status}: {}", String::from_utf8_lossy(&body))),
    })
}

/// The whole body of an answer.
///
/// # Errors
/// [`ClientError`] when the connection breaks, or the body is too long.
pub async fn whole(answer: Response<Incoming>) -> Result<Bytes, ClientError> {
    let body = Limited::new(answer.into_body(), MAX_BODY).collect().await;
    Ok(body.map_err(|e| ClientError::Answer(e.to_string()))?.to_bytes())
}
