//! All connections of a guest: between packets and sockets.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use tracing::{debug, trace};
use vmm_sys_util::epoll::EventSet;

use super::connection::{Connection, Phase};
use super::packet::{HOST_CID, Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};
use crate::virtio::events::Poll;

/// Most connections at a time: each is a descriptor of the host's.
const MAX_CONNECTIONS: usize = 1000;
/// Most answers that wait for the guest's buffers. A guest that gives no buffers loses what is above.
const MAX_ANSWERS: usize = 4 * MAX_CONNECTIONS;
/// Longest first line of a host program.
const MAX_GREETING: usize = 32;
/// The host's ports for connections that its programs make.
const FIRST_PORT: u32 = 1 << 30;
/// Most bytes of one packet to the guest.
pub const MAX_DATA: usize = 64 << 10;
/// The token of the listening socket; those of connections are below.
pub const LISTENER: u64 = 1 << 40;

/// What is waited for. Edge-triggered: what is there is remembered in `readable`, and asked for when the guest has room.
const EVENTS: EventSet = EventSet::from_bits_truncate(
    EventSet::IN.bits()
        | EventSet::OUT.bits()
        | EventSet::READ_HANG_UP.bits()
        | EventSet::EDGE_TRIGGERED.bits(),
);

/// A connection's name: the host's port, then the guest's. One that does not know its guest's port yet has 0 there, which
/// is no port.
type Key = (u32, u32);

/// All connections.
pub struct Muxer {
    cid: u64,
    path: PathBuf,
    listener: UnixListener,
    connections: BTreeMap<u64, (Key, Connection)>,
    tokens: BTreeMap<Key, u64>,
    next_token: u64,
    next_port: u32,
    /// Packets without data that wait for the guest's buffers.
    answers: VecDeque<Header>,
    /// Connections whose sockets may have data.
    readable: VecDeque<u64>,
}

impl Muxer {
    /// For a guest with this `cid`; `listener` is at `path`.
    pub fn new(cid: u64, path: &Path, listener: UnixListener) -> Self {
        Self {
            cid,
            path: path.to_owned(),
            listener,
            connections: BTreeMap::new(),
            tokens: BTreeMap::new(),
            next_token: 0,
            next_port: FIRST_PORT,
            answers: VecDeque::new(),
            readable: VecDeque::new(),
        }
    }

    /// The listening socket.
    pub fn listener_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }

    /// The listening socket, and those of connections.
    pub fn host_sockets(&self) -> io::Result<Vec<OwnedFd>> {
        let mut sockets = vec![OwnedFd::from(self.listener.try_clone()?)];
        for (_, connection) in self.connections.values() {
            sockets.push(connection.stream.try_clone()?.into());
        }
        Ok(sockets)
    }

    /// Goes on with the connections that there are, after a pause.
    pub fn attach(&mut self, poll: &Poll) {
        let failed: Vec<u64> = self
            .connections
            .iter()
            .filter(|(token, (_, c))| poll.add_for(c.stream.as_raw_fd(), **token, EVENTS).is_err())
            .map(|(&token, _)| token)
            .collect();
        for token in failed {
            self.close(token, true);
        }
    }

    /// Ends all connections: the guest has forgotten them.
    pub fn clear(&mut self) {
        self.connections.clear();
        self.tokens.clear();
        self.answers.clear();
        self.readable.clear();
    }

    /// A host program connects.
    pub fn accept(&mut self, poll: &Poll) {
        // The listener does not block: at most what waits now.
        while let Ok((stream, _)) = self.listener.accept() {
            if self.connections.len() >= MAX_CONNECTIONS || stream.set_nonblocking(true).is_err() {
                debug!("a connection to the guest is refused: there are too many");
                continue;
            }
            let port = self.free_port();
            self.insert((port, 0), Connection::new(stream, Phase::Greeting), poll);
        }
    }

    fn free_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT);
            let taken = self.tokens.range((port, 0)..=(port, u32::MAX)).next().is_some();
            if !taken {
                return port;
            }
        }
    }

    fn insert(&mut self, key: Key, connection: Connection, poll: &Poll) {
        let token = self.next_token;
        self.next_token += 1;
        let fd = connection.stream.as_raw_fd();
        if let Err(e) = poll.add_for(fd, token, EVENTS) {
            debug!("a connection is refused: {e}");
            if key.1 != 0 {
                self.reset(key);
            }
            return;
        }
        self.tokens.insert(key, token);
        self.connections.insert(token, (key, connection));
    }

    /// A socket is ready.
    pub fn ready(&mut self, token: u64, events: EventSet) {
        let Some((key, connection)) = self.connections.get_mut(&token) else { return };
        let key = *key;
        if events.contains(EventSet::OUT) && connection.has_waiting() {
            let sent = connection.send_waiting();
            if sent.is_err() {
                self.close(token, true);
                return;
            }
            if connection.is_drained() {
                // What the guest sent before it closed is with the host.
                let _ = connection.stream.shutdown(Shutdown::Write);
            }
            if connection.should_tell() {
                let mut update = self.header(key, op::CREDIT_UPDATE);
                if let Some((_, connection)) = self.connections.get_mut(&token) {
                    connection.tell(&mut update);
                }
                self.answer(update);
            }
            self.close_if_over(token);
        }
        if events.intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR) {
            self.look_at(token);
        }
    }

    fn look_at(&mut self, token: u64) {
        if self.connections.get(&token).is_some_and(|(_, c)| c.phase == Phase::Greeting) {
            self.greet(token);
        } else if !self.readable.contains(&token) {
            self.readable.push_back(token);
        }
    }

    /// The first line of a host program: `CONNECT PORT`.
    fn greet(&mut self, token: u64) {
        let Some((key, connection)) = self.connections.get_mut(&token) else { return };
        let mut byte = [0];
        // Byte by byte, so that what follows the line stays in the socket.
        while connection.greeting.last() != Some(&b'\n') {
            match connection.receive(&mut byte) {
                Ok(Some(1)) if connection.greeting.len() < MAX_GREETING => connection.greeting.push(byte[0]),
                Ok(None) => return,
                _ => return self.close(token, false),
            }
        }
        let line = String::from_utf8_lossy(&connection.greeting);
        let words: Vec<&str> = line.split_whitespace().collect();
        let port = match words.as_slice() {
            [verb, port] if verb.eq_ignore_ascii_case("connect") => port.parse::<u32>().ok(),
            _ => None,
        };
        let Some(port) = port.filter(|&p| p != 0) else {
            debug!("a host program said {line:?} and not CONNECT PORT");
            return self.close(token, false);
        };
        connection.request();
        self.tokens.remove(key);
        *key = (key.0, port);
        let key = *key;
        self.tokens.insert(key, token);
        let mut request = self.header(key, op::REQUEST);
        if let Some((_, connection)) = self.connections.get_mut(&token) {
            connection.tell(&mut request);
        }
        self.answer(request);
    }

    /// A packet of the guest.
    pub fn packet(&mut self, header: &Header, data: &[u8], poll: &Poll) {
        trace!("guest: {header:?}");
        if header.src_cid != self.cid || header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            if header.op != op::RST {
                self.answer(header.answer(op::RST));
            }
            return;
        }
        let key = (header.dst_port, header.src_port);
        let Some(&token) = self.tokens.get(&key) else {
            match header.op {
                op::REQUEST => self.connect(header, poll),
                op::RST => {}
                _ => self.reset(key),
            }
            return;
        };
        let Some((_, connection)) = self.connections.get_mut(&token) else { return };
        connection.take_credit(header);
        let phase = connection.phase;
        match (header.op, phase) {
            (op::RST, _) => self.close(token, false),
            (op::RESPONSE, Phase::Requested) => {
                connection.phase = Phase::Open;
                let ok = format!("OK {}\n", key.0);
                // A few bytes into an empty socket.
                if connection.stream.write_all(ok.as_bytes()).is_err() {
                    return self.close(token, true);
                }
                self.look_at(token);
            }
            (op::RW, Phase::Open) => {
                if connection.send(data).is_err() {
                    return self.close(token, true);
                }
                if connection.should_tell() {
                    self.update(token);
                }
            }
            (op::CREDIT_UPDATE, Phase::Open) => {}
            (op::CREDIT_REQUEST, Phase::Open) => self.update(token),
            (op::SHUTDOWN, Phase::Open) => {
                connection.guest_done |= header.flags & (SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
                if connection.is_drained() {
                    // The socket may be gone already.
                    let _ = connection.stream.shutdown(Shutdown::Write);
                }
                self.close_if_over(token);
            }
            _ => self.close(token, true),
        }
        // It may have room now.
        self.look_at_open(token);
    }

    fn look_at_open(&mut self, token: u64) {
        if self.connections.get(&token).is_some_and(|(_, c)| c.phase == Phase::Open && c.wants_data()) {
            self.look_at(token);
        }
    }

    fn update(&mut self, token: u64) {
        let Some((key, _)) = self.connections.get(&token) else { return };
        let mut update = self.header(*key, op::CREDIT_UPDATE);
        if let Some((_, connection)) = self.connections.get_mut(&token) {
            connection.tell(&mut update);
        }
        self.answer(update);
    }

    /// The guest connects to a port of the host: to the Unix socket with that number.
    fn connect(&mut self, header: &Header, poll: &Poll) {
        let key = (header.dst_port, header.src_port);
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{}", header.dst_port));
        let stream = UnixStream::connect(&path).and_then(|stream| {
            stream.set_nonblocking(true)?;
            Ok(stream)
        });
        match stream {
            Ok(stream) if self.connections.len() < MAX_CONNECTIONS && key.1 != 0 => {
                let mut connection = Connection::new(stream, Phase::Open);
                connection.take_credit(header);
                let mut response = self.header(key, op::RESPONSE);
                connection.tell(&mut response);
                self.insert(key, connection, poll);
                if self.tokens.contains_key(&key) {
                    self.answer(response);
                }
            }
            Ok(_) => self.reset(key),
            Err(e) => {
                debug!("the guest's connection to port {} is refused: {e}", header.dst_port);
                self.reset(key);
            }
        }
    }

    fn header(&self, key: Key, op: u16) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: key.0,
            dst_port: key.1,
            kind: TYPE_STREAM,
            op,
            ..Header::default()
        }
    }

    fn answer(&mut self, header: Header) {
        if self.answers.len() < MAX_ANSWERS {
            self.answers.push_back(header);
        }
    }

    fn reset(&mut self, key: Key) {
        let header = self.header(key, op::RST);
        self.answer(header);
    }

    /// Ends a connection. With `tell` the guest learns of it.
    fn close(&mut self, token: u64, tell: bool) {
        if let Some((key, connection)) = self.connections.remove(&token) {
            self.tokens.remove(&key);
            if tell && connection.phase != Phase::Greeting {
                self.reset(key);
            }
        }
    }

    /// Ends a connection of which nothing is to come.
    fn close_if_over(&mut self, token: u64) {
        let over = self
            .connections
            .get(&token)
            .is_some_and(|(_, c)| c.is_drained() && (c.host_done || c.guest_done & SHUTDOWN_RECEIVE != 0));
        if over {
            self.close(token, true);
        }
    }

    /// Whether something could be for the guest.
    pub fn has_packets(&self) -> bool {
        !self.answers.is_empty() || !self.readable.is_empty()
    }

    /// The next packet for the guest with at most `room` bytes of data, which go into `data`.
    pub fn next_packet(&mut self, room: usize, data: &mut [u8]) -> Option<Header> {
        if let Some(answer) = self.answers.pop_front() {
            return Some(answer);
        }
        while let Some(token) = self.readable.pop_front() {
            let Some((key, connection)) = self.connections.get_mut(&token) else { continue };
            let key = *key;
            let len = room.min(data.len()).min(connection.credit() as usize);
            if !connection.wants_data() || len == 0 {
                // The guest's next word on its room leads back here.
                continue;
            }
            match connection.receive(&mut data[..len]) {
                Ok(Some(0)) => {
                    connection.host_done = true;
                    let mut header = self.header(key, op::SHUTDOWN);
                    header.flags = SHUTDOWN_SEND;
                    if let Some((_, connection)) = self.connections.get_mut(&token) {
                        connection.tell(&mut header);
                    }
                    self.close_if_over(token);
                    return Some(header);
                }
                Ok(Some(n)) => {
                    // There may be more; others come first.
                    self.readable.push_back(token);
                    let mut header = self.header(key, op::RW);
                    header.len = n as u32;
                    if let Some((_, connection)) = self.connections.get_mut(&token) {
                        connection.tell(&mut header);
                    }
                    return Some(header);
                }
                Ok(None) => {}
                Err(e) => {
                    debug!("a connection ends: {e}");
                    self.close(token, false);
                    return Some(self.header(key, op::RST));
                }
            }
        }
        None
    }
}

/// Listens at `path`; a socket that an ended process left there is replaced.
///
/// # Errors
/// What the host says; [`io::ErrorKind::AddrInUse`] when something is there that is in use, or is no socket.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    use std::os::unix::fs::FileTypeExt;
    let listener = match UnixListener::bind(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            let is_socket = std::fs::symlink_metadata(path)?.file_type().is_socket();
            let refused =
                || UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused);
            if !is_socket || !refused() {
                return Err(e);
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        result => result?,
    };
    listener.set_nonblocking(true)?;
    Ok(listener)
}
