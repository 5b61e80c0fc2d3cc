//! What the host and the guest's agent say to each other, on one vsock stream a command.
//!
//! ```text
//!   host                                                        guest
//!   Hello(1) Exec{argv, …}  ───────────────────────────────────►
//!                           ◄─────────────────────────────────── Hello(1) Started{stdin_credit}
//!   stdin: bytes            ───────────────────────────────────►
//!                           ◄─────────────────────────────────── Credit(Stdin, n)
//!                           ◄─────────────────────────────────── stdout: bytes   stderr: bytes
//!   Credit(Stdout, n)       ───────────────────────────────────►
//!   CloseStdin, Signal(2), WindowSize{…}  ─────────────────────►
//!                           ◄─────────────────────────────────── Exited(Code(0))
//! ```
//!
//! **Frames.** A length (32 bits, little-endian), a kind (a byte), and that many bytes less one. A kind is the greeting, a
//! message ([`FromHost`], [`FromGuest`], in the `postcard` format), or data of a stream. No frame is longer than
//! [`MAX_PAYLOAD`], and [`Decoder`] keeps no more than one frame and what was fed to it at once.
//!
//! **Versions.** Each side greets with the highest version that it speaks; the lower of the two holds
//! ([`agree`]). Messages of later versions are added at the ends of the enums.
//!
//! **Flow control.** Who reads a stream grants credit, in bytes, as it gets rid of what came; who writes sends no more than
//! that. So a reader that is slow stops the writer and nothing grows, and messages never wait behind data that nobody takes.
//!
//! The load in the guests of `berth rehearse` has a protocol of its own, of single lines ([`load`]).
//!
//! Neither side trusts the other. This crate does no I/O: it turns bytes into frames and back.

mod frame;
pub mod load;
mod message;

pub use frame::{Decoder, Frame, FrameError, MAX_PAYLOAD, Stream, data, hello, message};
pub use message::{Exec, Exit, FailureKind, FromGuest, FromHost, GuestInfo, WindowSize};

/// The highest version of the protocol that this crate speaks.
pub const VERSION: u16 = 1;
/// The vsock port that the agent listens at.
pub const PORT: u32 = 1024;
/// Most bytes of credit for a stream that count; a side that is granted more takes it for this.
pub const MAX_CREDIT: u32 = 16 << 20;
/// Most bytes of a stream's data in one frame that a side should send, so that messages are never far behind.
pub const CHUNK: usize = 32 << 10;

/// The version that two sides use, when the other says `theirs`; none if there is none in common.
pub fn agree(theirs: u16) -> Option<u16> {
    (theirs >= 1).then(|| theirs.min(VERSION))
}
