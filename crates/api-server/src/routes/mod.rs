//! All routes, and the OpenAPI document that is made of them.

mod console;
mod control;
mod events;
mod look;
mod memory;
mod metrics;
mod vm;

use std::sync::Arc;

use axum::routing::get;
use axum::{Json, Router, middleware};
use berth_api::types::{ApiError, Event};
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::error::Failure;
use crate::peer;
use crate::server::Shared;

/// What the document says besides the routes.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Berth: control API of a VM",
        description = "HTTP on the Unix socket of one VM, for its owner. Every error has a body of the type ApiError."
    ),
    servers((url = "/", description = "the Unix socket of the VM")),
    components(schemas(ApiError, Event)),
    tags(
        (name = "vm", description = "What the VM is and what it uses"),
        (name = "memory", description = "Where addresses lead and memory is"),
        (name = "control", description = "Steering it"),
        (name = "devices", description = "Its devices"),
        (name = "console", description = "Its console")
    )
)]
struct Document;

fn router() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(vm::info))
        .routes(routes!(vm::stats))
        .routes(routes!(vm::engine))
        .routes(routes!(control::pause))
        .routes(routes!(control::resume))
        .routes(routes!(control::reset))
        .routes(routes!(control::power_button))
        .routes(routes!(control::stop))
        .routes(routes!(control::kill))
        .routes(routes!(control::set_balloon))
        .routes(routes!(control::set_cpu))
        .routes(routes!(memory::reclaim))
        .routes(routes!(memory::set_memory))
        .routes(routes!(memory::move_store_to_file))
        .routes(routes!(memory::freeze))
        .routes(routes!(memory::thaw))
        .routes(routes!(control::resize_disk))
        .routes(routes!(console::attach))
        .routes(routes!(console::set_size))
        .routes(routes!(events::events))
        .routes(routes!(look::explain))
        .routes(routes!(look::map))
        .routes(routes!(metrics::metrics))
        .routes(routes!(document))
}

/// The OpenAPI document of this API
///
/// The same as docs/openapi.json of the sources.
#[utoipa::path(get, path = "/openapi.json", tag = "vm", responses((status = 200, body = serde_json::Value)))]
async fn document() -> Json<utoipa::openapi::OpenApi> {
    Json(openapi())
}

/// The OpenAPI document.
pub fn openapi() -> utoipa::openapi::OpenApi {
    router().into_openapi()
}

/// The API of one VM.
pub(crate) fn app(shared: Arc<Shared>) -> Router {
    let (router, _document) = router().split_for_parts();
    router
        .route("/", get(Failure::no_route))
        .fallback(Failure::no_route)
        .method_not_allowed_fallback(Failure::no_method)
        .layer(middleware::from_fn(peer::only_owner))
        .with_state(shared)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_openapi_document_in_docs_is_current() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/openapi.json");
        let current = super::openapi().to_pretty_json().unwrap() + "\n";
        if std::env::var_os("BLESS").is_some() {
            std::fs::write(path, &current).unwrap();
        }
        let there = std::fs::read_to_string(path).unwrap_or_default();
        assert!(there == current, "docs/openapi.json is old: BLESS=1 cargo test -p berth-api-server openapi");
    }
}
