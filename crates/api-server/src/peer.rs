//! Who connects (unix(7), SO_PEERCRED).

use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, Request};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::serve::IncomingStream;
use tokio::net::UnixListener;

use crate::error::Failure;

/// The user whose process connected; `None` if the kernel does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer(Option<u32>);

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        Self(stream.io().peer_cred().ok().map(|credentials| credentials.uid()))
    }
}

impl Peer {
    fn may(self, owner: u32) -> bool {
        self.0.is_some_and(|uid| uid == owner || uid == 0)
    }
}

/// Lets only the owner of this process and root through.
pub async fn only_owner(ConnectInfo(peer): ConnectInfo<Peer>, request: Request, next: Next) -> Response {
    if peer.may(rustix::process::geteuid().as_raw()) {
        next.run(request).await
    } else {
        Failure::forbidden("this VM belongs to another user").into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_owner_and_root_may() {
        assert!(Peer(Some(1000)).may(1000) && Peer(Some(0)).may(1000));
        assert!(!Peer(Some(1001)).may(1000) && !Peer(None).may(1000) && !Peer(Some(1000)).may(0));
    }
}
