//! What Berth itself says: messages and the log, both on standard error.

use std::io::{self, Write, stderr};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use crate::terminal;

/// The environment variable that says what is logged, such as `debug` or `berth_machine=trace`.
const VARIABLE: &str = "BERTH_LOG";

/// Starts the log. Without [`VARIABLE`] it holds warnings and errors.
pub fn start() {
    let text = std::env::var(VARIABLE).unwrap_or_default();
    let builder = EnvFilter::builder().with_default_directive(LevelFilter::WARN.into());
    let filter = builder.parse(&text).unwrap_or_else(|e| {
        message(&format!("{VARIABLE} is ignored: {e}"));
        EnvFilter::new("warn")
    });
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| Lines).without_time().init();
}

/// Prints a line of Berth's own for the user.
pub fn message(text: &str) {
    // There is nowhere left to say that this failed.
    let _ = writeln!(Lines, "berth: {text}");
}

/// Standard error, with line ends that also work while the terminal is raw.
struct Lines;

impl Write for Lines {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if terminal::is_raw() {
            stderr().write_all(&with_carriage_returns(data))?;
        } else {
            stderr().write_all(data)?;
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        stderr().flush()
    }
}

/// A raw terminal goes down at a line feed but not back to the left.
fn with_carriage_returns(data: &[u8]) -> Vec<u8> {
    let mut text = Vec::with_capacity(data.len() + 2);
    for &byte in data {
        if byte == b'\n' {
            text.push(b'\r');
        }
        text.push(byte);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_feeds_get_a_carriage_return() {
        assert_eq!(with_carriage_returns(b"a\nb\n"), b"a\r\nb\r\n");
    }
}
