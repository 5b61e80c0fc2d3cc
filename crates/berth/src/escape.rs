//! Keys that are for Berth and not for the guest: Ctrl-A and one more.

/// Ctrl-A.
const PREFIX: u8 = 0x01;

/// The keys, for the user.
pub const HELP: &str = "\
Ctrl-A x  end the VM at once
Ctrl-A p  press the VM's power button
Ctrl-A a  send Ctrl-A to the guest (Ctrl-A Ctrl-A does too)
Ctrl-A h  this list";

/// The keys where the VM is only attached to.
pub const ATTACHED_HELP: &str = "\
Ctrl-A d  detach; the VM goes on
Ctrl-A x  end the VM at once
Ctrl-A p  press the VM's power button
Ctrl-A a  send Ctrl-A to the guest (Ctrl-A Ctrl-A does too)
Ctrl-A h  this list";

/// What a key asks of Berth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// End the VM.
    End,
    /// Leave the console, and let the VM go on.
    Detach,
    /// Press the power button.
    PowerButton,
    /// List the keys.
    Help,
}

/// Takes Berth's keys out of the input, however it is cut into pieces.
#[derive(Debug, Default)]
pub struct EscapeFilter {
    prefix_seen: bool,
    can_detach: bool,
}

impl EscapeFilter {
    /// For a terminal that can leave the VM.
    pub fn attached() -> Self {
        Self { prefix_seen: false, can_detach: true }
    }

    /// Appends to `guest` what the guest shall get of `input`; returns what Berth shall do, in order.
    pub fn feed(&mut self, input: &[u8], guest: &mut Vec<u8>) -> Vec<Key> {
        let mut keys = Vec::new();
        for &byte in input {
            if !std::mem::take(&mut self.prefix_seen) {
                self.prefix_seen = byte == PREFIX;
                if !self.prefix_seen {
                    guest.push(byte);
                }
                continue;
            }
            match byte {
                b'x' | b'X' => keys.push(Key::End),
                b'd' | b'D' if self.can_detach => keys.push(Key::Detach),
                b'p' | b'P' => keys.push(Key::PowerButton),
                b'h' | b'H' | b'?' => keys.push(Key::Help),
                b'a' | PREFIX => guest.push(PREFIX),
                // No key of Berth's: the guest gets what was typed.
                other => guest.extend([PREFIX, other]),
            }
        }
        keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds the pieces one after the other.
    fn feed(pieces: &[&[u8]]) -> (Vec<u8>, Vec<Key>) {
        let (mut filter, mut guest) = (EscapeFilter::default(), Vec::new());
        let keys = pieces.iter().flat_map(|piece| filter.feed(piece, &mut guest)).collect();
        (guest, keys)
    }

    #[test]
    fn ordinary_input_passes() {
        assert_eq!(feed(&[b"ls -l\r\x03\x04\xff\0"]), (b"ls -l\r\x03\x04\xff\0".to_vec(), vec![]));
    }

    #[test]
    fn keys_are_taken_out() {
        assert_eq!(
            feed(&[b"a\x01hb\x01pc\x01x"]),
            (b"abc".to_vec(), vec![Key::Help, Key::PowerButton, Key::End])
        );
    }

    #[test]
    fn a_key_may_come_in_two_pieces() {
        assert_eq!(feed(&[b"\x01", b"", b"x"]), (vec![], vec![Key::End]));
    }

    #[test]
    fn ctrl_a_can_be_sent() {
        assert_eq!(feed(&[b"\x01a"]), (vec![1], vec![]));
        assert_eq!(feed(&[b"\x01\x01x"]), (vec![1, b'x'], vec![]));
    }

    #[test]
    fn other_keys_after_the_prefix_reach_the_guest() {
        assert_eq!(feed(&[b"\x01d"]), (vec![1, b'd'], vec![]));
    }

    #[test]
    fn who_is_attached_can_detach() {
        let mut guest = Vec::new();
        assert_eq!(EscapeFilter::attached().feed(b"a\x01d\x01x", &mut guest), [Key::Detach, Key::End]);
        assert_eq!(guest, b"a");
    }

    #[test]
    fn the_help_names_every_key() {
        for key in ["Ctrl-A x", "Ctrl-A p", "Ctrl-A a", "Ctrl-A h"] {
            assert!(HELP.contains(key) && ATTACHED_HELP.contains(key));
        }
        assert!(ATTACHED_HELP.contains("Ctrl-A d"));
    }
}
