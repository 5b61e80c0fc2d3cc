//! The screen.

use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Style, Stylize};
use ratatui::text::{Line, Text};
use ratatui::widgets::{Cell, Clear, Paragraph, Row, Table};

use super::app::App;
use super::format::{percent, size};
use super::rates::Rates;
use super::{cpus, table};

const KEYS: &str = " ↑↓ scroll  <> sort  r reverse  / filter  t threads  c host CPUs  h help  q end";

const HELP: &str = "\
 arrows, PgUp, PgDn, Home, End   scroll
 < >   choose the column to sort by
 r     reverse the order
 /     show only VMs with this in their names
 t     show the vCPU threads
 c     show which vCPU threads ran on which host CPU
 q     end

 CPU%    100 is one host CPU
 STEAL%  vCPUs wanted to run and no host CPU was free;
         100 is one vCPU that waited all the time
 ON      number of vCPUs; of a thread, its host CPU
 MEM     the guest's memory, RES what of the process
         is in the host's memory
 DISK, NET  bytes a second, as the guest sees them";

/// Draws it.
pub fn draw(frame: &mut Frame<'_>, app: &mut App) {
    let areas = Layout::vertical([Constraint::Length(2), Constraint::Min(1), Constraint::Length(1)]);
    let [head, body, foot] = areas.areas(frame.area());
    frame.render_widget(Paragraph::new(summary(&app.rates)), head);
    if app.shows_cpus() {
        draw_cpus(frame, app, body)
    } else {
        draw_vms(frame, app, body)
    }
    let text = match (app.typing, app.choice.filter.is_empty()) {
        (true, _) => format!(" filter: {}_  (Enter keeps it, Esc clears it)", app.choice.filter),
        (false, false) => format!(" filter: {}  (Esc clears it)", app.choice.filter),
        (false, true) => KEYS.to_owned(),
    };
    frame.render_widget(Paragraph::new(text).reversed(), foot);
    if app.help {
        draw_help(frame);
    }
}

/// Two lines about the host and all VMs.
fn summary(rates: &Rates) -> Text<'static> {
    let host = &rates.host;
    let load = host.load.map_or_else(|| "-".to_owned(), |l| l.map(|l| format!("{l:.2}")).join(" "));
    let used = host.memory_bytes.zip(host.memory_available_bytes).map(|(all, free)| all.saturating_sub(free));
    let first = format!(
        "host: load {load}  CPU {}% of {}  memory {} of {}  pressure cpu {} mem {} io {}",
        percent(host.busy_percent()),
        host.cpus.len(),
        size(used),
        size(host.memory_bytes),
        percent(host.pressure_cpu),
        percent(host.pressure_memory),
        percent(host.pressure_io),
    );
    let vcpus: usize = rates.vms.iter().map(|vm| vm.vcpus.len()).sum();
    let promised: u64 = rates.vms.iter().filter_map(|vm| vm.memory_bytes).sum();
    let resident: u64 = rates.vms.iter().filter_map(|vm| vm.resident_bytes).sum();
    let s = if rates.vms.len() == 1 { "" } else { "s" };
    let second = format!(
        "{} VM{s}: {vcpus} vCPUs on {} host CPUs, {} memory promised, {} resident",
        rates.vms.len(),
        host.cpus.len(),
        size(Some(promised)),
        size(Some(resident)),
    );
    Text::from(vec![Line::from(first), Line::from(second)])
}

fn draw_vms(frame: &mut Frame<'_>, app: &mut App, area: Rect) {
    let rows = table::rows(&app.rates.vms, &app.choice);
    let first = scroll(app, rows.len(), area);
    let widths = table::widths(&rows, area.width);
    let head = table::COLUMNS.iter().enumerate().map(|(i, column)| {
        let chosen = i == app.choice.column;
        let style = if chosen { Style::new().reversed().bold() } else { Style::new().bold() };
        Cell::new(aligned(i, column.title.to_owned())).style(style)
    });
    let shown = rows.into_iter().skip(first).take(app.page).map(|row| {
        let cells = row.cells.into_iter().enumerate().map(|(i, text)| Cell::new(aligned(i, text)));
        Row::new(cells).style(if row.is_vm { Style::new() } else { Style::new().dim() })
    });
    let head = Row::new(head.collect::<Vec<_>>());
    frame.render_widget(Table::new(shown, widths).header(head).column_spacing(table::SPACING), area);
    if app.rates.vms.is_empty() {
        empty(frame, area, "No VM runs. `berth run --detach` starts one.");
    }
}

/// Names to the left, numbers to the right.
fn aligned(column: usize, text: String) -> Line<'static> {
    Line::from(text).alignment(if column < 2 { Alignment::Left } else { Alignment::Right })
}

fn draw_cpus(frame: &mut Frame<'_>, app: &mut App, area: Rect) {
    let rows = cpus::rows(&app.rates, &app.placement, &app.choice.filter);
    let first = scroll(app, rows.len(), area);
    let shown = rows.into_iter().skip(first).take(app.page).map(|row| {
        Row::new([
            Cell::new(aligned(2, row.cpu.to_string())),
            Cell::new(aligned(2, percent(row.busy_percent))),
            Cell::new(row.threads()),
        ])
    });
    let widths = [Constraint::Length(4), Constraint::Length(6), Constraint::Min(10)];
    let head = [
        aligned(2, "CPU".to_owned()),
        aligned(2, "BUSY%".to_owned()),
        Line::from("vCPU threads, and what they took of it"),
    ];
    let head = Row::new(head.map(Cell::new)).bold();
    frame.render_widget(Table::new(shown, widths).header(head).column_spacing(1), area);
}

/// Puts the first row right, so that the last page is full; returns it.
fn scroll(app: &mut App, rows: usize, area: Rect) -> usize {
    app.page = usize::from(area.height.saturating_sub(1)).max(1);
    app.top = app.top.min(rows.saturating_sub(app.page));
    app.top
}

fn empty(frame: &mut Frame<'_>, area: Rect, text: &str) {
    let [_, line] = Layout::vertical([Constraint::Length(2), Constraint::Length(1)]).areas(area);
    frame.render_widget(Paragraph::new(text), line);
}

fn draw_help(frame: &mut Frame<'_>) {
    let all = frame.area();
    let height = (HELP.lines().count() as u16).min(all.height);
    let width = 60.min(all.width);
    let area =
        Rect { x: all.x + (all.width - width) / 2, y: all.y + (all.height - height) / 2, width, height };
    frame.render_widget(Clear, area);
    frame.render_widget(Paragraph::new(HELP).reversed(), area);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::top::placement::Placement;
    use crate::top::testing::{sample, vm};
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use ratatui::crossterm::event::{KeyCode, KeyEvent};

    fn app(count: usize) -> App {
        let name = |i| format!("vm{i:02}");
        let at = |t: f64| sample((0..count).map(|i| vm(&name(i), t, t * i as f64 / 10.0)).collect());
        let (old, mut new) = (at(10.0), at(11.0));
        new.host.cpus = vec![berth_host::CpuTimes { cpu: 0, busy: 1, total: 2 }];
        App::new(Rates::between(&old, &new))
    }

    fn screen(app: &mut App, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, app)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
        (0..height).map(|y| line(y).trim_end().to_owned()).collect()
    }

    #[test]
    fn eighty_by_twenty_four_holds_all_columns() {
        let lines = screen(&mut app(30), 80, 24);
        assert!(lines[0].starts_with("host: load"), "{lines:#?}");
        assert!(lines[1].starts_with("30 VMs: 60 vCPUs on 1 host CPUs, 15G memory promised"), "{lines:#?}");
        assert_eq!(lines[2].split_whitespace().collect::<Vec<_>>(), table::COLUMNS.map(|c| c.title));
        // 24 lines less two at the top, the titles and the foot.
        assert!(lines[3].starts_with("vm29"), "{lines:#?}");
        assert_eq!(
            lines[3].split_whitespace().collect::<Vec<_>>(),
            ["vm29", "running", "290.0", "0.0", "x2", "512M", "100M", "64M", "0", "0", "0", "0"]
        );
        assert!(lines[22].starts_with("vm10") && lines[23].contains("q end"), "{lines:#?}");
    }

    #[test]
    fn scrolling_ends_with_the_last_row_on_the_last_line() {
        let mut app = app(30);
        screen(&mut app, 80, 24);
        app.key(KeyEvent::from(KeyCode::End));
        let lines = screen(&mut app, 80, 24);
        assert!(lines[3].starts_with("vm19") && lines[22].starts_with("vm00"), "{lines:#?}");
        app.key(KeyEvent::from(KeyCode::PageUp));
        assert!(screen(&mut app, 80, 24)[3].starts_with("vm29"));
    }

    #[test]
    fn the_other_views_have_their_lines() {
        let mut app = app(2);
        app.key(KeyEvent::from(KeyCode::Char('t')));
        let lines = screen(&mut app, 100, 12);
        assert!(lines[4].starts_with("  vcpu0") && lines[4].contains("sleeps"), "{lines:#?}");
        app.key(KeyEvent::from(KeyCode::Char('c')));
        app.placement = Placement::default();
        let lines = screen(&mut app, 100, 12);
        assert!(lines[2].contains("BUSY%") && lines[3].trim_start().starts_with('0'), "{lines:#?}");
        app.key(KeyEvent::from(KeyCode::Char('h')));
        assert!(screen(&mut app, 100, 30).iter().any(|l| l.contains("reverse the order")));
        let lines = screen(&mut self::app(0), 80, 24);
        assert!(lines.iter().any(|l| l.contains("No VM runs")), "{lines:#?}");
    }

    #[test]
    fn no_size_is_too_small() {
        for (width, height) in [(1, 1), (3, 2), (10, 3), (20, 5), (300, 100)] {
            for keys in ["", "c", "t", "h", "/abc"] {
                let mut app = app(5);
                for key in keys.chars() {
                    app.key(KeyEvent::from(KeyCode::Char(key)));
                }
                screen(&mut app, width, height);
            }
        }
    }
}
