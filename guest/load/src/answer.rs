//! Answers to the host: a line for each byte.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use berth_agent_protocol::load::{ASK, Count};
use berth_guest_agent::Listener;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Waits for connections and serves each on a thread of its own.
///
/// # Errors
/// What the kernel says when it lets nobody wait.
pub fn serve(listener: &Listener, count: impl Fn() -> Count + Send + Sync + 'static) -> io::Result<()> {
    let count = Arc::new(count);
    loop {
        match poll(&mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        while let Some(connection) = listener.accept() {
            let count = Arc::clone(&count);
            // A connection that cannot be served is closed by what is dropped.
            let _ = thread::Builder::new().spawn(move || answer(connection, &*count));
        }
    }
}

/// Serves one connection to its end.
fn answer(connection: OwnedFd, count: &dyn Fn() -> Count) {
    // Whatever family the socket is of: what is used of it is the same for all.
    let mut stream = UnixStream::from(connection);
    if stream.set_nonblocking(false).is_err() {
        return;
    }
    let mut byte = [0];
    // Whatever ends the connection, it is the host's.
    while matches!(stream.read(&mut byte), Ok(1)) {
        if byte[0] == ASK && stream.write_all(count().to_line().as_bytes()).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;

    #[test]
    fn each_question_has_a_line_and_other_bytes_none() {
        let directory = std::env::temp_dir().join(format!("berth-load-{}", std::process::id()));
        // One of a run before that had this number.
        let _ = std::fs::remove_file(&directory);
        let listening = UnixListener::bind(&directory).unwrap();
        listening.set_nonblocking(true).unwrap();
        let listener = Listener::trusting(listening.into());
        thread::spawn(move || {
            serve(&listener, || Count { nanos: 1, units: 2, errors: 3, ready: true }).unwrap();
        });
        let mut stream = UnixStream::connect(&directory).unwrap();
        std::fs::remove_file(&directory).unwrap();
        stream.write_all(b"x?\n?").unwrap();
        let mut lines = BufReader::new(stream).lines();
        for _ in 0..2 {
            assert_eq!(lines.next().unwrap().unwrap(), "1 2 3 1");
        }
    }
}
