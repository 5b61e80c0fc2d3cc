//! What the screen shows, and what keys do to it.

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::placement::Placement;
use super::rates::Rates;
use super::table::{COLUMNS, Choice};

/// How far a page scrolls when nothing has been drawn yet.
const PAGE: usize = 10;

/// The state of the screen.
pub struct App {
    /// What happened between the last two samples.
    pub rates: Rates,
    /// Where threads were in that time.
    pub placement: Placement,
    /// What the user chose.
    pub choice: Choice,
    /// The first row that is shown; the view puts it right.
    pub top: usize,
    /// Rows that fit; set by the view.
    pub page: usize,
    /// The keys are for the filter.
    pub typing: bool,
    /// The keys are explained.
    pub help: bool,
    cpus: bool,
}

impl App {
    /// Begins with the VMs.
    pub fn new(rates: Rates) -> Self {
        Self {
            rates,
            placement: Placement::default(),
            choice: Choice::default(),
            top: 0,
            page: PAGE,
            typing: false,
            help: false,
            cpus: false,
        }
    }

    /// There is something new.
    pub fn update(&mut self, rates: Rates, placement: Placement) {
        self.rates = rates;
        self.placement = placement;
    }

    /// Whether the host's CPUs are shown instead of the VMs.
    pub fn shows_cpus(&self) -> bool {
        self.cpus
    }

    /// A key; whether it is the end.
    pub fn key(&mut self, key: KeyEvent) -> bool {
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return matches!(key.code, KeyCode::Char('c'));
        }
        if self.typing {
            self.filter_key(key.code);
            return false;
        }
        let was_help = std::mem::take(&mut self.help);
        match key.code {
            KeyCode::Char('q') => return true,
            // Esc goes back, and ends when there is nothing to go back to.
            KeyCode::Esc if was_help => {}
            KeyCode::Esc if self.cpus => self.show_cpus(false),
            KeyCode::Esc if !self.choice.filter.is_empty() => self.choice.filter.clear(),
            KeyCode::Esc => return true,
            KeyCode::Char('h' | '?') => self.help = !was_help,
            KeyCode::Char('c') => self.show_cpus(!self.cpus),
            KeyCode::Char('t') => self.choice.threads = !self.choice.threads,
            KeyCode::Char('r') => self.choice.reverse = !self.choice.reverse,
            KeyCode::Char('/') => self.typing = true,
            KeyCode::Char('<') | KeyCode::Left => self.sort_by(self.choice.column.checked_sub(1)),
            KeyCode::Char('>') | KeyCode::Right => self.sort_by(Some(self.choice.column + 1)),
            KeyCode::Up | KeyCode::Char('k') => self.scroll(-1),
            KeyCode::Down | KeyCode::Char('j') => self.scroll(1),
            KeyCode::PageUp => self.scroll(-(self.page as isize)),
            KeyCode::PageDown | KeyCode::Char(' ') => self.scroll(self.page as isize),
            KeyCode::Home | KeyCode::Char('g') => self.top = 0,
            KeyCode::End | KeyCode::Char('G') => self.top = usize::MAX,
            _ => {}
        }
        false
    }

    fn show_cpus(&mut self, cpus: bool) {
        self.cpus = cpus;
        self.top = 0;
        self.placement = Placement::default();
    }

    fn scroll(&mut self, rows: isize) {
        self.top = self.top.saturating_add_signed(rows);
    }

    fn sort_by(&mut self, column: Option<usize>) {
        if let Some(column) = column.filter(|c| *c < COLUMNS.len()) {
            self.choice.column = column;
        }
    }

    fn filter_key(&mut self, key: KeyCode) {
        self.top = 0;
        match key {
            KeyCode::Enter => self.typing = false,
            KeyCode::Esc => {
                self.choice.filter.clear();
                self.typing = false;
            }
            KeyCode::Backspace => drop(self.choice.filter.pop()),
            KeyCode::Char(c) => self.choice.filter.push(c),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn press(app: &mut App, keys: &[KeyCode]) -> bool {
        keys.iter().fold(false, |_, &key| app.key(KeyEvent::from(key)))
    }

    #[test]
    fn keys_choose_what_is_shown() {
        let mut app = App::new(Rates::default());
        assert!(!press(&mut app, &[KeyCode::Char('c'), KeyCode::Char('t'), KeyCode::Char('r')]));
        assert!(app.shows_cpus() && app.choice.threads && app.choice.reverse);
        press(&mut app, &[KeyCode::Right; 40]);
        assert_eq!(app.choice.column, COLUMNS.len() - 1);
        press(&mut app, &[KeyCode::Char('<'); 40]);
        assert_eq!(app.choice.column, 0);
        press(&mut app, &[KeyCode::Up, KeyCode::End, KeyCode::Down, KeyCode::Home]);
        assert_eq!(app.top, 0);
    }

    #[test]
    fn while_a_filter_is_typed_keys_are_text() {
        let mut app = App::new(Rates::default());
        press(&mut app, &[KeyCode::Char('/'), KeyCode::Char('q'), KeyCode::Char('x'), KeyCode::Backspace]);
        assert!(app.typing && app.choice.filter == "q");
        press(&mut app, &[KeyCode::Enter]);
        assert!(!app.typing && app.choice.filter == "q");
        // Back step by step, then the end.
        assert!(!press(&mut app, &[KeyCode::Char('c'), KeyCode::Esc]));
        assert!(!app.shows_cpus());
        assert!(!press(&mut app, &[KeyCode::Esc]));
        assert!(app.choice.filter.is_empty());
        assert!(press(&mut app, &[KeyCode::Esc]));
    }

    #[test]
    fn the_end_is_q_and_control_c_even_while_typing() {
        let mut app = App::new(Rates::default());
        assert!(press(&mut app, &[KeyCode::Char('q')]));
        press(&mut app, &[KeyCode::Char('/')]);
        assert!(app.key(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)));
    }
}
