//! Steering the VM.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use berth_api::types::{ApiError, BalloonRequest, CpuRequest, DiskSizeRequest, StopRequest};
use berth_machine::options::{CpuLimit, check_weight};
use berth_machine::{DiskResizeError, MachineControl, MachineState};
use tokio::sync::oneshot;
use tokio::task::spawn_blocking;

use crate::error::{Answer, Body, Failure, Path};
use crate::server::Shared;

/// Lets vCPUs, devices and the guest's clock stand still
///
/// Done when it is answered. A VM that is paused stays so.
#[utoipa::path(post, path = "/pause", tag = "control", responses(
    (status = 204, description = "It stands still."),
    (status = 409, body = ApiError, description = "It has ended."),
))]
pub async fn pause(State(shared): State<Arc<Shared>>) -> Answer<StatusCode> {
    wait(&shared, MachineControl::request_pause).await
}

/// Lets a paused VM go on
///
/// Its guest does not see that time has passed. A VM that runs goes on running.
#[utoipa::path(post, path = "/resume", tag = "control", responses(
    (status = 204, description = "It runs."),
    (status = 409, body = ApiError, description = "It has ended."),
))]
pub async fn resume(State(shared): State<Arc<Shared>>) -> Answer<StatusCode> {
    wait(&shared, MachineControl::request_resume).await
}

/// Asks the machine for something, and waits until it is done without blocking the thread.
pub(super) async fn wait(
    shared: &Shared,
    request: impl FnOnce(&MachineControl, Box<dyn FnOnce() + Send>),
) -> Answer<StatusCode> {
    let (sender, done) = oneshot::channel();
    // Who asked may have gone away.
    request(&shared.vm.control, Box::new(move || _ = sender.send(())));
    done.await.map(|()| StatusCode::NO_CONTENT).map_err(|_| Failure::ended())
}

/// Does what takes long where it keeps no other request waiting. There is no answer only if it panics.
pub(super) async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Answer<T> {
    spawn_blocking(work).await.map_err(|_| Failure::ended())
}

pub(super) fn alive(shared: &Shared) -> Answer<()> {
    if shared.vm.control.state() == MachineState::Ended { Err(Failure::ended()) } else { Ok(()) }
}

/// Presses the reset button: the VM boots again, whatever its guest does
#[utoipa::path(post, path = "/reset", tag = "control", responses(
    (status = 202, description = "It will be reset at once."),
    (status = 409, body = ApiError, description = "It has ended."),
))]
pub async fn reset(State(shared): State<Arc<Shared>>) -> Answer<StatusCode> {
    alive(&shared)?;
    shared.vm.control.reset();
    Ok(StatusCode::ACCEPTED)
}

/// Presses the ACPI power button: asks the guest to power off
#[utoipa::path(post, path = "/power-button", tag = "control", responses(
    (status = 202, description = "The guest is told."),
    (status = 409, body = ApiError, description = "The guest does not watch the button, or the VM has ended."),
))]
pub async fn power_button(State(shared): State<Arc<Shared>>) -> Answer<StatusCode> {
    alive(&shared)?;
    if !shared.vm.control.hears_power_button() {
        return Err(Failure::not_possible("the guest does not watch its power button (yet)"));
    }
    shared.vm.control.power_button();
    Ok(StatusCode::ACCEPTED)
}

/// Asks the guest to power off, and ends it if it does not
///
/// Presses the power button as soon as the guest watches it. A paused VM goes on for that. The answer comes at once;
/// the end is an event.
#[utoipa::path(post, path = "/stop", tag = "control", request_body = StopRequest, responses(
    (status = 202, description = "It will end."),
    (status = 400, body = ApiError, description = "The body is no JSON."),
    (status = 409, body = ApiError, description = "It has ended."),
    (status = 415, body = ApiError, description = "The body is said to be no JSON."),
    (status = 422, body = ApiError, description = "The body makes no sense."),
))]
pub async fn stop(State(shared): State<Arc<Shared>>, Body(stop): Body<StopRequest>) -> Answer<StatusCode> {
    if stop.timeout_seconds > StopRequest::MAX_TIMEOUT {
        let most = StopRequest::MAX_TIMEOUT;
        return Err(Failure::unprocessable(format!("timeout_seconds: at most {most} are possible")));
    }
    alive(&shared)?;
    shared.vm.owner.stop(Duration::from_secs(stop.timeout_seconds.into()));
    Ok(StatusCode::ACCEPTED)
}

/// Ends the VM at once, whatever its guest does
///
/// What the guest has written to its disks is kept.
#[utoipa::path(post, path = "/kill", tag = "control", responses(
    (status = 202, description = "It will end."),
    (status = 409, body = ApiError, description = "It has ended."),
))]
pub async fn kill(State(shared): State<Arc<Shared>>) -> Answer<StatusCode> {
    alive(&shared)?;
    shared.vm.owner.kill();
    Ok(StatusCode::ACCEPTED)
}

/// Asks the guest to give memory back until it has given this much
#[utoipa::path(put, path = "/balloon", tag = "devices", request_body = BalloonRequest, responses(
    (status = 202, description = "The guest is asked."),
    (status = 400, body = ApiError, description = "The body is no JSON."),
    (status = 409, body = ApiError, description = "The VM has no balloon."),
    (status = 415, body = ApiError, description = "The body is said to be no JSON."),
    (status = 422, body = ApiError, description = "The body makes no sense."),
))]
pub async fn set_balloon(
    State(shared): State<Arc<Shared>>,
    Body(wanted): Body<BalloonRequest>,
) -> Answer<StatusCode> {
    if wanted.target_bytes > BalloonRequest::MAX_TARGET {
        let most = BalloonRequest::MAX_TARGET;
        return Err(Failure::unprocessable(format!("target_bytes: at most {most} are possible")));
    }
    let Some(balloon) = shared.vm.control.balloon() else {
        return Err(Failure::not_possible("this VM has no memory balloon: start it with --balloon"));
    };
    balloon.set_target(wanted.target_bytes.min(shared.vm.description.memory_bytes));
    Ok(StatusCode::ACCEPTED)
}

/// Changes how much CPU time the VM gets, while it runs
#[utoipa::path(put, path = "/cpu", tag = "control", request_body = CpuRequest, responses(
    (status = 204, description = "It is so from now on."),
    (status = 400, body = ApiError, description = "The body is no JSON."),
    (status = 409, body = ApiError, description = "The host does not let it, or the VM has ended."),
    (status = 415, body = ApiError, description = "The body is said to be no JSON."),
    (status = 422, body = ApiError, description = "The body makes no sense."),
))]
pub async fn set_cpu(
    State(shared): State<Arc<Shared>>,
    Body(wanted): Body<CpuRequest>,
) -> Answer<StatusCode> {
    alive(&shared)?;
    let no_sense = |e: berth_machine::options::OptionError| Failure::unprocessable(e.to_string());
    let weight = wanted.weight.map(check_weight).transpose().map_err(no_sense)?;
    let limit = match wanted.limit {
        Some(0.0) => Some(None),
        limit => limit.map(CpuLimit::try_from).transpose().map_err(no_sense)?.map(Some),
    };
    let control = shared.vm.control.clone();
    let set = aside(move || control.set_cpu_time(weight, limit)).await?;
    set.map_err(|e| Failure::not_possible(e.to_string()))?;
    Ok(StatusCode::NO_CONTENT)
}

/// Makes a disk larger while the guest runs
#[utoipa::path(put, path = "/disks/{id}/size", tag = "devices",
    params(("id" = String, Path, description = "The disk's id: `disk0` is the first one without an id.")),
    request_body = DiskSizeRequest, responses(
    (status = 204, description = "It has this size, and the guest was told."),
    (status = 400, body = ApiError, description = "The body is no JSON, or the path makes no sense."),
    (status = 404, body = ApiError, description = "There is no such disk."),
    (status = 409, body = ApiError, description = "The disk cannot have this size."),
    (status = 415, body = ApiError, description = "The body is said to be no JSON."),
    (status = 422, body = ApiError, description = "The body makes no sense."),
))]
pub async fn resize_disk(
    State(shared): State<Arc<Shared>>,
    Path(id): Path<String>,
    Body(wanted): Body<DiskSizeRequest>,
) -> Answer<StatusCode> {
    let (sector, most) = (DiskSizeRequest::SECTOR, DiskSizeRequest::MAX_SIZE);
    if !(sector..=most).contains(&wanted.size_bytes) || !wanted.size_bytes.is_multiple_of(sector) {
        let message = format!("size_bytes: only multiples of {sector} up to {most} are possible");
        return Err(Failure::unprocessable(message));
    }
    shared.vm.control.resize_disk(&id, wanted.size_bytes).map_err(|e| match e {
        DiskResizeError::NoDisk { .. } => Failure::not_found(e.to_string()),
        DiskResizeError::Image { .. } => Failure::not_possible(e.to_string()),
    })?;
    Ok(StatusCode::NO_CONTENT)
}
