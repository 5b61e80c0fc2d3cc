//! What happens to the VM, as server-sent events (HTML, 9.2).

use std::convert::Infallible;
use std::sync::Arc;

use axum::extract::State;
use axum::response::sse::{self, KeepAlive, Sse};
use berth_api::types::{ApiError, Event, EventKind};
use berth_machine::{Notice, Recorded};
use serde::Deserialize;
use tokio::sync::mpsc::{self, Sender};
use tokio_stream::wrappers::ReceiverStream;
use utoipa::{IntoParams, ToSchema};

use crate::error::{Answer, Query};
use crate::server::{Shared, state_of, unix_seconds};

/// Events that wait for a reader; more wait in the machine's record.
const QUEUE: usize = 16;

/// Parameters of `GET /events`.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct EventsQuery {
    /// The number of the last event that is known already: only those after it are sent. [default: 0]
    #[serde(default)]
    after: u64,
    /// Whether to go on with what happens from now on, and not only with what has happened. [default: true]
    #[serde(default = "yes")]
    #[param(default = true)]
    follow: bool,
}

/// A server-sent event.
#[derive(ToSchema)]
struct SentEvent {
    /// The number of the event: what `after` takes.
    id: String,
    /// JSON of the type Event.
    data: String,
}

fn yes() -> bool {
    true
}

type Item = Result<sse::Event, Infallible>;

/// What happens: state changes, resets, panics of the guest, the balloon, errors of devices
///
/// Server-sent events; the data of each is JSON of the type Event. First come the last ones that have happened, of
/// which 1024 are kept.
#[utoipa::path(get, path = "/events", tag = "vm", params(EventsQuery), responses(
    (status = 200, body = SentEvent, content_type = "text/event-stream", description = "One after the other."),
    (status = 400, body = ApiError, description = "A parameter makes no sense."),
))]
pub async fn events(
    State(shared): State<Arc<Shared>>,
    Query(query): Query<EventsQuery>,
) -> Answer<Sse<impl tokio_stream::Stream<Item = Item>>> {
    let (sender, events) = mpsc::channel(QUEUE);
    tokio::spawn(async move { send_all(&shared, &query, &sender).await });
    Ok(Sse::new(ReceiverStream::new(events)).keep_alive(KeepAlive::default()))
}

/// Sends until the reader goes away, or the VM has ended.
async fn send_all(shared: &Shared, query: &EventsQuery, sender: &Sender<Item>) -> Option<()> {
    let mut last = query.after;
    let mut ending = shared.ending.clone();
    loop {
        // Made before it is looked, so that nothing in between is missed.
        let happened = shared.happened.notified();
        let ended = ending.borrow_and_update().clone();
        for recorded in shared.vm.control.notices().after(last) {
            let missed = recorded.number - last - 1;
            if missed > 0 && last > 0 {
                let kind = EventKind::Missed { count: missed };
                send(sender, Event { id: recorded.number - 1, at: unix_seconds(recorded.at), kind }).await?;
            }
            last = recorded.number;
            send(sender, event(recorded)).await?;
        }
        if let Some(ending) = ended {
            return send(sender, Event { id: last + 1, at: ending.at, kind: EventKind::Ended(ending) }).await;
        }
        if !query.follow {
            return None;
        }
        tokio::select! {
            () = happened => {}
            changed = ending.changed() => changed.ok()?,
            () = sender.closed() => return None,
        }
    }
}

async fn send(sender: &Sender<Item>, event: Event) -> Option<()> {
    // It is made of numbers and text only.
    let sent = SentEvent { id: event.id.to_string(), data: serde_json::to_string(&event).ok()? };
    sender.send(Ok(sse::Event::default().id(sent.id).data(sent.data))).await.ok()
}

fn event(recorded: Recorded) -> Event {
    let kind = match recorded.notice {
        Notice::State(state) => EventKind::State { state: state_of(state) },
        Notice::Reset { by_guest } => EventKind::Reset { by_guest },
        Notice::GuestPanic { crash_loaded } => EventKind::GuestPanic { crash_loaded },
        Notice::Balloon { target, actual } => {
            EventKind::Balloon { target_bytes: target, actual_bytes: actual }
        }
        Notice::IoError { device, message } => EventKind::IoError { device, message },
    };
    Event { id: recorded.number, at: unix_seconds(recorded.at), kind }
}
