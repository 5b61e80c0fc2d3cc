//! The console: attached to by changing the connection's protocol (RFC 9110, 7.8).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::Body as HttpBody;
use axum::extract::{Request, State};
use axum::http::header::{CONNECTION, UPGRADE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use berth_api::types::{ApiError, ConsoleSize};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tracing::debug;

use crate::console::Chunk;
use crate::error::{Answer, Body, Failure};
use crate::server::Shared;

/// What the connection is after the upgrade: bytes of the console in both directions.
const PROTOCOL: &str = "berth-console";
/// Bytes that are sent at a time.
const CHUNK: usize = 16 << 10;
/// How long it is waited until input is offered again that the guest did not take.
const RETRY: Duration = Duration::from_millis(5);

type Stream = TokioIo<Upgraded>;

/// Attaches to the console
///
/// With `Connection: upgrade` and `Upgrade: berth-console` the connection becomes a stream of bytes: what the console
/// prints, beginning with the last 64 KiB of what it has printed, and what is typed in the other direction. There may
/// be several; all see the same, and all may type. It ends with the VM.
#[utoipa::path(get, path = "/console", tag = "console", responses(
    (status = 101, description = "From here on the connection is the console."),
    (status = 426, body = ApiError, description = "The request asks for no upgrade."),
))]
pub async fn attach(State(shared): State<Arc<Shared>>, mut request: Request) -> Response {
    let wanted = request.headers().get(UPGRADE).and_then(|v| v.to_str().ok());
    if !wanted.is_some_and(|v| v.eq_ignore_ascii_case(PROTOCOL)) {
        let message = format!("ask for it with the headers `Connection: upgrade` and `Upgrade: {PROTOCOL}`");
        let mut response = Failure::upgrade_required(message).into_response();
        response.headers_mut().insert(UPGRADE, HeaderValue::from_static(PROTOCOL));
        return response;
    }
    // Somebody wants to see what it does. Input thaws it too.
    shared.vm.control.request_thaw(|| ());
    let upgrade = hyper::upgrade::on(&mut request);
    shared.attached.fetch_add(1, Ordering::AcqRel);
    tokio::spawn(async move {
        match upgrade.await {
            Ok(upgraded) => serve(&shared, TokioIo::new(upgraded)).await,
            Err(e) => debug!("a connection to the console broke: {e}"),
        }
        shared.attached.fetch_sub(1, Ordering::AcqRel);
    });
    let mut response = Response::new(HttpBody::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
    response.headers_mut().insert(UPGRADE, HeaderValue::from_static(PROTOCOL));
    response
}

/// Until the reader goes away or the VM ends. Who only stops typing goes on reading.
async fn serve(shared: &Shared, stream: Stream) {
    let (input, output) = tokio::io::split(stream);
    let typing = async {
        type_in(shared, input).await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = print(shared, output) => {}
        () = typing => {}
    }
}

async fn print(shared: &Shared, mut output: WriteHalf<Stream>) {
    let console = &shared.vm.console;
    let mut place = console.place();
    loop {
        let text = match console.next(&mut place, CHUNK).await {
            Chunk::Bytes(bytes) => bytes,
            Chunk::Lost(count) => {
                format!("\r\n[berth: {count} bytes were not read in time]\r\n").into_bytes()
            }
            Chunk::Nothing => continue,
            Chunk::End => break,
        };
        if output.write_all(&text).await.is_err() {
            return;
        }
    }
    // A reader that is gone needs no end.
    let _ = output.shutdown().await;
}

async fn type_in(shared: &Shared, mut input: ReadHalf<Stream>) {
    let control = &shared.vm.control;
    let mut buffer = [0; 4096];
    loop {
        let Ok(n @ 1..) = input.read(&mut buffer).await else { return };
        let mut rest = buffer.get(..n).unwrap_or_default();
        while !rest.is_empty() {
            let taken = control.console_input(rest);
            rest = rest.get(taken..).unwrap_or_default();
            if !rest.is_empty() {
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// Tells the guest how large the terminal is
///
/// Only a virtio console can; a serial port cannot, and it does nothing then.
#[utoipa::path(put, path = "/console/size", tag = "console", request_body = ConsoleSize, responses(
    (status = 204, description = "The guest is told if it can be."),
    (status = 400, body = ApiError, description = "The body is no JSON."),
    (status = 415, body = ApiError, description = "The body is said to be no JSON."),
    (status = 422, body = ApiError, description = "The body makes no sense."),
))]
pub async fn set_size(
    State(shared): State<Arc<Shared>>,
    Body(size): Body<ConsoleSize>,
) -> Answer<StatusCode> {
    if size.columns == 0 || size.rows == 0 {
        return Err(Failure::unprocessable("columns and rows: from 1 on"));
    }
    shared.vm.control.set_console_size(size.columns, size.rows);
    Ok(StatusCode::NO_CONTENT)
}
