//! What the VM has of the host's memory.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use berth_api::types::{
    ApiError, FreezeAnswer, MemoryRequest, Moved, ReclaimRequest, Reclaimed, StoreFileRequest,
};
use berth_machine::options::MAX_PRIORITY;
use berth_machine::{MachineControl, MemoryShare};
use berth_memory::PAGE_SIZE;

use super::control::{alive, aside, wait};
use crate::error::{Answer, Body, Failure};
use crate::server::Shared;

/// Takes guest memory that is not in use to the cold store
///
/// Its pages are compressed, equal ones kept once, and each comes back when it is touched.
#[utoipa::path(post, path = "/reclaim", tag = "memory", request_body = ReclaimRequest, responses(
    (status = 200, body = Reclaimed),
    (status = 400, body = ApiError, description = "The body is no JSON."),
    (status = 409, body = ApiError, description = "The host or the engine lacks what it needs, or the VM has ended."),
    (status = 415, body = ApiError, description = "The body is said to be no JSON."),
    (status = 422, body = ApiError, description = "The body makes no sense."),
))]
pub async fn reclaim(
    State(shared): State<Arc<Shared>>,
    Body(wanted): Body<ReclaimRequest>,
) -> Answer<Json<Reclaimed>> {
    alive(&shared)?;
    if wanted.bytes > ReclaimRequest::MAX_BYTES {
        return Err(Failure::unprocessable(format!("bytes: at most {}", ReclaimRequest::MAX_BYTES)));
    }
    if wanted.idle_seconds > ReclaimRequest::MAX_IDLE {
        return Err(Failure::unprocessable(format!("idle_seconds: at most {}", ReclaimRequest::MAX_IDLE)));
    }
    let control = shared.vm.control.clone();
    let idle = Duration::from_secs(wanted.idle_seconds.into());
    let evicted = aside(move || control.reclaim(wanted.bytes, idle)).await?;
    let evicted = evicted.map_err(|e| Failure::not_possible(e.to_string()))?;
    let bytes = |pages: u64| pages * PAGE_SIZE;
    Ok(Json(Reclaimed { bytes: bytes(evicted.pages), zero_bytes: bytes(evicted.zero) }))
}

/// Changes what the VM may have of the host's memory, while it runs
#[utoipa::path(put, path = "/memory", tag = "memory", request_body = MemoryRequest, responses(
    (status = 204, description = "It is so from now on."),
    (status = 400, body = ApiError, description = "The body is no JSON."),
    (status = 409, body = ApiError, description = "It cannot be together with the VM's size, or the VM has ended."),
    (status = 415, body = ApiError, description = "The body is said to be no JSON."),
    (status = 422, body = ApiError, description = "The body makes no sense."),
))]
pub async fn set_memory(
    State(shared): State<Arc<Shared>>,
    Body(wanted): Body<MemoryRequest>,
) -> Answer<StatusCode> {
    alive(&shared)?;
    let most = MemoryRequest::MAX_BYTES;
    if wanted.reserve_bytes.max(wanted.limit_bytes) > Some(most) {
        return Err(Failure::unprocessable(format!("reserve_bytes, limit_bytes: at most {most}")));
    }
    if wanted.priority > Some(MAX_PRIORITY) {
        return Err(Failure::unprocessable(format!("priority: at most {MAX_PRIORITY}")));
    }
    let control = &shared.vm.control;
    let now = control.memory_share();
    let limit = match wanted.limit_bytes {
        Some(0) => None,
        Some(limit) => Some(limit),
        None => now.limit,
    };
    let share = MemoryShare {
        reserve: wanted.reserve_bytes.unwrap_or(now.reserve),
        limit,
        priority: wanted.priority.unwrap_or(now.priority),
    };
    control.set_memory_share(share).map_err(|e| Failure::not_possible(e.to_string()))?;
    Ok(StatusCode::NO_CONTENT)
}

/// Moves what the cold store has in memory to its file
///
/// What is there for longest moves first, in segments of 256 KiB. Without `--store-dir` nothing moves.
#[utoipa::path(post, path = "/store/file", tag = "memory", request_body = StoreFileRequest, responses(
    (status = 200, body = Moved),
    (status = 400, body = ApiError, description = "The body is no JSON."),
    (status = 409, body = ApiError, description = "The file cannot be written, or the VM has ended."),
    (status = 415, body = ApiError, description = "The body is said to be no JSON."),
    (status = 422, body = ApiError, description = "The body makes no sense."),
))]
pub async fn move_store_to_file(
    State(shared): State<Arc<Shared>>,
    Body(wanted): Body<StoreFileRequest>,
) -> Answer<Json<Moved>> {
    alive(&shared)?;
    if wanted.bytes > ReclaimRequest::MAX_BYTES {
        return Err(Failure::unprocessable(format!("bytes: at most {}", ReclaimRequest::MAX_BYTES)));
    }
    let control = shared.vm.control.clone();
    let moved = aside(move || control.move_store_to_file(wanted.bytes)).await?;
    Ok(Json(Moved { bytes: moved.map_err(|e| Failure::not_possible(e.to_string()))? }))
}

/// Lets the VM stand still with its memory in the cold store, until it is used
///
/// It stands still as when it is paused. All memory above the reserve goes to the cold store, and that to its file if it
/// may have one. The VM goes on when somebody attaches to its console or types there, when a program of the host uses its
/// sockets (as `berth exec` does) or a forwarded port, or when it is thawed or resumed.
#[utoipa::path(post, path = "/freeze", tag = "memory", responses(
    (status = 200, body = FreezeAnswer),
    (status = 409, body = ApiError, description = "It does not run, or the host lacks what it needs."),
))]
pub async fn freeze(State(shared): State<Arc<Shared>>) -> Answer<Json<FreezeAnswer>> {
    let control = shared.vm.control.clone();
    let frozen = aside(move || control.freeze()).await?;
    let frozen = frozen.map_err(|e| Failure::not_possible(e.to_string()))?;
    Ok(Json(FreezeAnswer { bytes: frozen.evicted.pages * PAGE_SIZE, file_bytes: frozen.to_file }))
}

/// Lets a frozen VM go on
///
/// Does nothing to one that runs or that its owner has paused.
#[utoipa::path(post, path = "/thaw", tag = "memory", responses(
    (status = 204, description = "It is not frozen."),
    (status = 409, body = ApiError, description = "It has ended."),
))]
pub async fn thaw(State(shared): State<Arc<Shared>>) -> Answer<StatusCode> {
    wait(&shared, MachineControl::request_thaw).await
}
