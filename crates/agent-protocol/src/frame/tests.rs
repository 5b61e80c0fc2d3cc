use super::*;
use crate::{Exec, Exit, FailureKind, FromGuest, FromHost, GuestInfo, VERSION, WindowSize, agree};

fn exec() -> FromHost {
    FromHost::Exec(Exec {
        argv: vec![b"ls".to_vec(), vec![0xff, 0]],
        env: vec![(b"A".to_vec(), Vec::new())],
        workdir: Some(b"/".to_vec()),
        user: Some("ann".to_owned()),
        tty: Some(WindowSize { columns: 80, rows: 24 }),
        stdin: true,
        output_credit: 1 << 20,
    })
}

fn from_host() -> Vec<FromHost> {
    vec![
        FromHost::Ping,
        FromHost::Info,
        exec(),
        FromHost::Credit(Stream::Stderr, u32::MAX),
        FromHost::CloseStdin,
        FromHost::CloseOutput(Stream::Stdout),
        FromHost::Signal(15),
        FromHost::WindowSize(WindowSize { columns: 0, rows: u16::MAX }),
    ]
}

/// Everything that there is, in one stream, and what it means.
fn everything() -> (Vec<u8>, Vec<Frame<FromHost>>) {
    let mut bytes = hello(VERSION);
    let mut frames = vec![Frame::Hello(VERSION)];
    for m in from_host() {
        bytes.extend(message(&m).unwrap());
        frames.push(Frame::Message(m));
    }
    for stream in [Stream::Stdin, Stream::Stdout, Stream::Stderr] {
        bytes.extend(data(stream, b"\0\xff\n"));
        frames.push(Frame::Data(stream, b"\0\xff\n".to_vec()));
    }
    (bytes, frames)
}

/// The frames in `bytes`, fed in parts of the sizes that `size` gives.
fn decode_in_parts(
    bytes: &[u8],
    mut size: impl FnMut() -> usize,
) -> Result<Vec<Frame<FromHost>>, FrameError> {
    let mut decoder = Decoder::default();
    let mut frames = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let (part, later) = rest.split_at(size().clamp(1, rest.len()));
        decoder.feed(part);
        rest = later;
        while let Some(frame) = decoder.next_frame()? {
            frames.push(frame);
        }
        assert!(decoder.kept() <= HEADER + MAX_PAYLOAD + part.len(), "{} bytes kept", decoder.kept());
    }
    Ok(frames)
}

#[test]
fn what_was_encoded_is_decoded_however_it_is_cut() {
    let (bytes, frames) = everything();
    assert_eq!(decode_in_parts(&bytes, || usize::MAX).unwrap(), frames);
    assert_eq!(decode_in_parts(&bytes, || 1).unwrap(), frames);
    let mut random = fastrand::Rng::with_seed(1);
    for _ in 0..200 {
        assert_eq!(decode_in_parts(&bytes, || random.usize(1..40)).unwrap(), frames);
    }
}

#[test]
fn the_guests_messages_survive_too() {
    let info = GuestInfo { kernel: "6.1".to_owned(), uptime_ms: u64::MAX, ..GuestInfo::default() };
    for m in [
        FromGuest::Pong,
        FromGuest::Info(info),
        FromGuest::Started { pid: 7, stdin_credit: 65536 },
        FromGuest::Credit(1),
        FromGuest::StdinClosed,
        FromGuest::Exited(Exit::Code(255)),
        FromGuest::Exited(Exit::Signal(9)),
        FromGuest::Failed { kind: FailureKind::NotFound, text: "no\0such".to_owned() },
    ] {
        let mut decoder = Decoder::default();
        decoder.feed(&message(&m).unwrap());
        assert_eq!(decoder.next_frame(), Ok(Some(Frame::Message(m))));
        assert_eq!(decoder.next_frame::<FromGuest>(), Ok(None));
        assert_eq!(decoder.kept(), 0);
    }
}

/// Most bytes that a value of `bytes` makes us keep is what `bytes` has; and nothing makes us panic.
#[test]
fn damaged_bytes_are_an_error_or_other_frames() {
    let (bytes, _) = everything();
    let mut random = fastrand::Rng::with_seed(2);
    let mut errors = 0;
    for _ in 0..20_000 {
        let mut damaged = bytes.clone();
        for _ in 0..random.usize(1..6) {
            let at = random.usize(..damaged.len());
            match random.u8(..4) {
                0 => damaged[at] = random.u8(..),
                1 => damaged[at] ^= 1 << random.u8(..8),
                2 => drop(damaged.drain(at..)),
                _ => damaged.insert(at, random.u8(..)),
            }
            if damaged.is_empty() {
                damaged.push(0);
            }
        }
        errors += u32::from(decode_in_parts(&damaged, || random.usize(1..500)).is_err());
    }
    assert!(errors > 1000, "only {errors} of 20000 were noticed");
}

#[test]
fn random_bytes_are_refused_or_waited_for() {
    let mut random = fastrand::Rng::with_seed(3);
    for _ in 0..20_000 {
        let len = random.usize(1..64);
        let bytes: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(len).collect();
        let _ = decode_in_parts(&bytes, || random.usize(1..20));
        // The same as a message, whose header is right.
        let _ = decode_in_parts(&frame(MESSAGE, &bytes), || random.usize(1..20));
    }
}

#[test]
fn each_mistake_has_its_error_and_it_stays() {
    for (bytes, error) in [
        (vec![0, 0, 0, 0], FrameError::Length(0)),
        (vec![0xff, 0xff, 0xff, 0xff], FrameError::Length(u32::MAX)),
        (vec![2, 0, 4, 0], FrameError::Length(0x4_0002)),
        (frame(6, b""), FrameError::Kind(6)),
        (frame(0, b"abc"), FrameError::Kind(0)),
        (frame(HELLO, b"berth\0"), FrameError::Greeting),
        (frame(HELLO, b"HTTP/1.1"), FrameError::Greeting),
        (frame(MESSAGE, b""), FrameError::Message),
        (frame(MESSAGE, &[0xff]), FrameError::Message),
        // A ping with something behind it.
        (frame(MESSAGE, &[0, 0]), FrameError::Message),
        // A command of 2^32 arguments.
        (frame(MESSAGE, &[2, 0x80, 0x80, 0x80, 0x80, 0x10]), FrameError::Message),
        (frame(STDIN, b""), FrameError::Empty),
    ] {
        let mut decoder = Decoder::default();
        decoder.feed(&bytes);
        assert_eq!(decoder.next_frame::<FromHost>(), Err(error), "{bytes:?}");
        decoder.feed(&hello(1));
        assert_eq!(decoder.next_frame::<FromHost>(), Err(error));
        assert_eq!(decoder.kept(), 0);
    }
}

#[test]
fn the_longest_frame_goes_through_and_no_longer_one() {
    let most = vec![7; MAX_PAYLOAD];
    let frames = decode_in_parts(&data(Stream::Stdout, &most), || 4096).unwrap();
    assert_eq!(frames, [Frame::Data(Stream::Stdout, most.clone())]);
    let more = [most, vec![8]].concat();
    assert_eq!(decode_in_parts(&data(Stream::Stdout, &more), || 4096).unwrap().len(), 2);
    let exec = Exec { argv: vec![more], ..Exec::default() };
    assert_eq!(message(&FromHost::Exec(exec)), None);
}

#[test]
fn the_lower_version_holds() {
    assert_eq!(agree(0), None);
    assert_eq!(agree(1), Some(1));
    assert_eq!(agree(u16::MAX), Some(VERSION));
}

#[test]
fn a_signal_counts_as_in_a_shell() {
    assert_eq!(Exit::Code(3).status(), 3);
    assert_eq!(Exit::Signal(9).status(), 137);
    assert_eq!(Exit::Signal(255).status(), 255);
}
