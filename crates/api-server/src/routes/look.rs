//! Where an address leads, and where memory is.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use berth_api::types::{ApiError, ExplainQuery, MapQuery};
use berth_explain::{Explanation, MapError, MemoryMap, Question, Space};
use berth_machine::{LookError, MachineControl};

use super::control::aside;
use crate::error::{Answer, Failure, Query};
use crate::server::Shared;

/// Explains where an address of the guest leads
///
/// Through page tables, guest physical memory and the memory of the VM's process to the machine frame, as far as the VM's
/// process may know. At most one of pid, cr3 and physical; without them the address is one of the vCPU's.
#[utoipa::path(get, path = "/explain", tag = "memory", params(ExplainQuery), responses(
    (status = 200, body = Explanation),
    (status = 400, body = ApiError, description = "The address is none, or the question makes no sense."),
    (status = 404, body = ApiError, description = "There is no such vCPU, or no such process of the guest."),
    (status = 409, body = ApiError, description = "The VM has ended, or was reset meanwhile."),
))]
pub async fn explain(
    State(shared): State<Arc<Shared>>,
    Query(query): Query<ExplainQuery>,
) -> Answer<Json<Explanation>> {
    let space = match (query.pid, query.cr3, query.physical) {
        (None, None, false) => Space::Vcpu,
        (None, None, true) => Space::Physical,
        (None, Some(cr3), false) => Space::Cr3(cr3),
        (Some(pid), None, false) => Space::Process(pid),
        _ => return Err(Failure::bad_request("at most one of pid, cr3 and physical can be given")),
    };
    let question =
        Question { address: query.address, space, access: query.access, privilege: query.privilege };
    let answer = look(&shared, move |control, vm| control.explain(vm, query.vcpu, &question)).await?;
    answer.map(Json).map_err(|error| match error {
        LookError::NoVcpu { .. } => Failure::not_found(error.to_string()),
        LookError::Gone => Failure::wrong_state(error.to_string()),
        LookError::Explain(ref e) if e.is_not_found() => Failure::not_found(error.to_string()),
        LookError::Explain(_) => Failure::bad_request(error.to_string()),
    })
}

/// A map of guest physical memory by page state
#[utoipa::path(get, path = "/map", tag = "memory", params(MapQuery), responses(
    (status = 200, body = MemoryMap),
    (status = 400, body = ApiError, description = "The size of chunks is not possible."),
    (status = 409, body = ApiError, description = "The host does not say where memory is."),
))]
pub async fn map(
    State(shared): State<Arc<Shared>>,
    Query(query): Query<MapQuery>,
) -> Answer<Json<MemoryMap>> {
    if query.chunk_bytes.is_some_and(|chunk| chunk > MapQuery::MAX_CHUNK) {
        let most = MapQuery::MAX_CHUNK;
        return Err(Failure::bad_request(format!("chunk_bytes: at most {most} are possible")));
    }
    let map = look(&shared, move |control, vm| control.memory_map(vm, query.chunk_bytes)).await?;
    map.map(Json).map_err(|error| match error {
        MapError::BadChunk { .. } => Failure::bad_request(error.to_string()),
        MapError::Host(_) => Failure::not_possible(error.to_string()),
    })
}

/// Looks at the machine on a thread that may block.
async fn look<T: Send + 'static>(
    shared: &Shared,
    look: impl FnOnce(&MachineControl, &str) -> T + Send + 'static,
) -> Answer<T> {
    let (control, name) = (shared.vm.control.clone(), shared.vm.description.name.clone());
    aside(move || look(&control, &name)).await
}
