//! All sessions, in one thread that sleeps in poll(2).

use std::io;
use std::os::fd::AsFd;

use berth_agent_protocol::CHUNK;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::Listener;
use crate::command::Process;
use crate::session::Session;

/// Most connections at a time.
const MAX_SESSIONS: usize = 128;

/// The agent.
pub struct Server {
    listener: Listener,
    sessions: Vec<Session>,
    /// Commands whose sessions are over.
    left: Vec<Process>,
}

impl Server {
    /// For whoever connects at `listener`.
    pub fn new(listener: Listener) -> Self {
        Self { listener, sessions: Vec::new(), left: Vec::new() }
    }

    /// Serves until something goes wrong.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn serve(mut self) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK];
        // Sessions that have something to do at once.
        let mut again = false;
        loop {
            let ready = self.wait(again)?;
            again = false;
            let mut ready = ready.into_iter();
            let listener = ready.next().unwrap_or_default();
            let sessions = std::mem::take(&mut self.sessions);
            for (mut session, ready) in sessions.into_iter().zip(ready) {
                if !ready && !session.is_eager() {
                    self.sessions.push(session);
                    continue;
                }
                match session.step(&mut buffer) {
                    Ok(()) => {
                        again |= session.is_eager();
                        self.sessions.push(session);
                    }
                    Err(over) => self.left.extend(session.end(&over)),
                }
            }
            // A process that was waited for is gone.
            self.left.retain_mut(|process| matches!(process.child.try_wait(), Ok(None)));
            if listener {
                self.accept();
            }
        }
    }

    /// Sleeps until something can be done; whether it is at the listener, then for each session.
    fn wait(&self, again: bool) -> io::Result<Vec<bool>> {
        let mut fds = vec![PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        // Of each session, where its descriptors end.
        let mut ends = vec![1];
        for session in &self.sessions {
            fds.extend(session.wants().map(|(fd, flags)| PollFd::new(fd, flags)));
            ends.push(fds.len());
        }
        fds.extend(self.left.iter().map(|process| PollFd::new(process.exit.as_fd(), PollFlags::POLLIN)));
        match poll(&mut fds, if again { PollTimeout::ZERO } else { PollTimeout::NONE }) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        let mut start = 0;
        let is_ready = |end: usize| {
            let of_it = fds.get(start..end).unwrap_or_default();
            start = end;
            of_it.iter().any(|fd| fd.any().unwrap_or(true))
        };
        Ok(ends.into_iter().map(is_ready).collect())
    }

    fn accept(&mut self) {
        while let Some(socket) = self.listener.accept() {
            let session = Session::new(socket);
            if self.sessions.len() < MAX_SESSIONS {
                self.sessions.push(session);
            } else {
                session.refuse();
            }
        }
    }
}
