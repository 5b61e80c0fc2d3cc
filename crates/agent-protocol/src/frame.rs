//! Frames: from bytes and to bytes.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Most bytes of a frame after its kind. Enough for a command line of many arguments.
pub const MAX_PAYLOAD: usize = 256 << 10;
/// Bytes of a frame's length.
const LENGTH: usize = 4;
/// Bytes of length and kind.
const HEADER: usize = LENGTH + 1;
/// How a greeting begins; the version follows.
const MAGIC: &[u8; 6] = b"berth\0";

const HELLO: u8 = 1;
const MESSAGE: u8 = 2;
const STDIN: u8 = 3;
const STDOUT: u8 = 4;
const STDERR: u8 = 5;

/// The streams of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stream {
    /// Its standard input.
    Stdin,
    /// Its standard output, or its terminal's.
    Stdout,
    /// Its standard error.
    Stderr,
}

/// A frame with messages of type `M`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame<M> {
    /// The greeting, with the highest version that the other side speaks.
    Hello(u16),
    /// A message.
    Message(M),
    /// Bytes of a stream; never empty.
    Data(Stream, Vec<u8>),
}

/// Why bytes are no frame. Nothing that follows can be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Its length.
    #[error("a frame of {0} bytes, which is empty or more than {MAX_PAYLOAD}")]
    Length(u32),
    /// Its kind.
    #[error("a frame of the unknown kind {0}")]
    Kind(u8),
    /// A greeting.
    #[error("a greeting that is not Berth's")]
    Greeting,
    /// A message.
    #[error("a message that cannot be understood")]
    Message,
    /// Data without data.
    #[error("a stream's frame without data")]
    Empty,
}

/// The greeting, for a side that speaks versions up to `version`.
pub fn hello(version: u16) -> Vec<u8> {
    frame(HELLO, &[&MAGIC[..], &version.to_le_bytes()].concat())
}

/// A message; `None` if it is longer than [`MAX_PAYLOAD`].
pub fn message<M: Serialize>(message: &M) -> Option<Vec<u8>> {
    let payload = postcard::to_allocvec(message).ok()?;
    (payload.len() <= MAX_PAYLOAD).then(|| frame(MESSAGE, &payload))
}

/// Frames with bytes of a stream: one, or more for more than [`MAX_PAYLOAD`] bytes, none for none.
pub fn data(stream: Stream, bytes: &[u8]) -> Vec<u8> {
    let kind = match stream {
        Stream::Stdin => STDIN,
        Stream::Stdout => STDOUT,
        Stream::Stderr => STDERR,
    };
    bytes.chunks(MAX_PAYLOAD).flat_map(|part| frame(kind, part)).collect()
}

fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEADER + payload.len());
    // At most MAX_PAYLOAD + 1.
    frame.extend(((payload.len() + 1) as u32).to_le_bytes());
    frame.push(kind);
    frame.extend(payload);
    frame
}

/// Takes bytes as they come and gives frames. After an error it gives nothing but that error.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Where in `buffer` the next frame begins.
    start: usize,
    error: Option<FrameError>,
}

impl Decoder {
    /// Takes bytes. Take all frames ([`Self::next_frame`]) before the next ones: then never more is kept than one frame and
    /// what is fed at once.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.error.is_none() {
            self.buffer.extend_from_slice(bytes);
        }
    }

    /// The next frame, if all of it has come.
    ///
    /// # Errors
    /// [`FrameError`].
    pub fn next_frame<M: DeserializeOwned>(&mut self) -> Result<Option<Frame<M>>, FrameError> {
        if let Some(error) = self.error {
            return Err(error);
        }
        self.parse().inspect_err(|&error| {
            *self = Self { error: Some(error), ..Self::default() };
        })
    }

    fn parse<M: DeserializeOwned>(&mut self) -> Result<Option<Frame<M>>, FrameError> {
        let rest = self.buffer.get(self.start..).unwrap_or_default();
        let Some((length, rest)) = rest.split_first_chunk::<LENGTH>() else {
            self.forget();
            return Ok(None);
        };
        let length = u32::from_le_bytes(*length);
        let len = length as usize;
        if len == 0 || len > MAX_PAYLOAD + 1 {
            return Err(FrameError::Length(length));
        }
        let Some((&kind, payload)) = rest.get(..len).and_then(<[u8]>::split_first) else {
            self.forget();
            return Ok(None);
        };
        let frame = decode(kind, payload)?;
        self.start += LENGTH + len;
        Ok(Some(frame))
    }

    /// Drops what was taken. Done when more bytes are needed, so that each byte moves once at most; an idle connection
    /// keeps no buffer.
    fn forget(&mut self) {
        self.buffer.drain(..self.start);
        self.start = 0;
        if self.buffer.is_empty() {
            self.buffer = Vec::new();
        }
    }

    /// Bytes that are kept.
    #[cfg(test)]
    fn kept(&self) -> usize {
        self.buffer.len()
    }
}

fn decode<M: DeserializeOwned>(kind: u8, payload: &[u8]) -> Result<Frame<M>, FrameError> {
    let stream = match kind {
        HELLO => {
            let version = payload.strip_prefix(MAGIC).and_then(|v| <[u8; 2]>::try_from(v).ok());
            return version.map(|v| Frame::Hello(u16::from_le_bytes(v))).ok_or(FrameError::Greeting);
        }
        MESSAGE => {
            let (message, rest) = postcard::take_from_bytes(payload).map_err(|_| FrameError::Message)?;
            return if rest.is_empty() { Ok(Frame::Message(message)) } else { Err(FrameError::Message) };
        }
        STDIN => Stream::Stdin,
        STDOUT => Stream::Stdout,
        STDERR => Stream::Stderr,
        other => return Err(FrameError::Kind(other)),
    };
    if payload.is_empty() { Err(FrameError::Empty) } else { Ok(Frame::Data(stream, payload.to_vec())) }
}

#[cfg(test)]
mod tests;
