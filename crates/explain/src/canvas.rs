//! The little of SVG 1.1 that the pictures need.

use std::fmt::{Display, Write};

/// Where a text is held.
#[derive(Clone, Copy)]
pub enum Anchor {
    Start,
    Middle,
    End,
}

/// A picture that is drawn from the back to the front. Lengths are in pixels; classes are those of [`STYLE`].
pub struct Canvas {
    body: String,
    width: f64,
}

/// Colours: guest virtual is blue, guest physical green, host virtual amber, the machine violet, faults red.
const STYLE: &str = "\
text{font-family:'DejaVu Sans',Verdana,sans-serif;font-size:12px;fill:#1f2933}\
.mono{font-family:'DejaVu Sans Mono',Menlo,Consolas,monospace}\
.title{font-size:18px;font-weight:bold}.small{font-size:10.5px;fill:#52606d}.faint{font-size:10.5px;fill:#9aa5b1}\
.strong{font-weight:bold}.white{fill:#fff;font-weight:bold}.big{font-size:15px}\
.paper{fill:#fff}.box{fill:#f5f7fa;stroke:#cbd2d9}.line{stroke:#9aa5b1;fill:none;stroke-width:1.5}\
.virtual{fill:#2563eb}.physical{fill:#047857}.host{fill:#b45309}.machine{fill:#7c3aed}.fault{fill:#b91c1c}.grey{fill:#7b8794}\
.card-physical{fill:#ecfdf5;stroke:#047857}.card-host{fill:#fffbeb;stroke:#b45309}\
.card-machine{fill:#f5f3ff;stroke:#7c3aed}.card-fault{fill:#fef2f2;stroke:#b91c1c}.card-virtual{fill:#eff6ff;stroke:#2563eb}\
.way{stroke:#2563eb;fill:none;stroke-width:2}.way-physical{stroke:#047857;fill:none;stroke-width:2}\
.untouched{fill:#e4e7eb}.resident{fill:#047857}.shared{fill:#2563eb}.stored{fill:#7c3aed}.released{fill:#d9b36c}";

impl Canvas {
    pub fn new(width: f64) -> Self {
        Self { body: String::new(), width }
    }

    // Writing to a String cannot fail.
    pub fn rect(&mut self, class: &str, (x, y): (f64, f64), (width, height): (f64, f64), radius: f64) {
        let _ = write!(
            self.body,
            "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" \
             rx=\"{radius:.1}\"/>"
        );
    }

    pub fn text(&mut self, class: &str, (x, y): (f64, f64), anchor: Anchor, text: impl Display) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let text = escape(&text.to_string());
        let _ = write!(
            self.body,
            "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>"
        );
    }

    /// Lines of text under each other, 15 pixels apart.
    pub fn lines(&mut self, class: &str, (x, y): (f64, f64), lines: &[String]) {
        for (i, line) in lines.iter().enumerate() {
            self.text(class, (x, y + 15.0 * i as f64), Anchor::Start, line);
        }
    }

    /// A curve from one point to another that leaves and arrives horizontally, with an arrow's head.
    pub fn arrow(&mut self, class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
        let (end, bend) = (x2 - 7.0, ((x2 - x1).abs() / 2.0).max(14.0));
        let _ = write!(
            self.body,
            "<path class=\"{class}\" d=\"M{x1:.1},{y1:.1}C{:.1},{y1:.1} {:.1},{y2:.1} {end:.1},{y2:.1}\"/>\
             <path class=\"{class}\" style=\"stroke-linejoin:round\" d=\"M{end:.1},{:.1}L{x2:.1},{y2:.1}L{end:.1},{:.1}\"/>",
            x1 + bend,
            end - bend,
            y2 - 4.0,
            y2 + 4.0,
        );
    }

    /// A straight line.
    pub fn line(&mut self, class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
        let _ = write!(self.body, "<path class=\"{class}\" d=\"M{x1:.1},{y1:.1}L{x2:.1},{y2:.1}\"/>");
    }

    /// The whole file, `height` pixels high.
    pub fn finish(self, height: f64, title: &str) -> String {
        let (width, body, title) = (self.width, self.body, escape(title));
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" \
             height=\"{height:.0}\" role=\"img\"><title>{title}</title><style>{STYLE}</style>\
             <rect class=\"paper\" width=\"100%\" height=\"100%\"/>{body}</svg>\n"
        )
    }
}

/// `text` for XML. Control characters, which XML 1.0 does not have, are left out.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            c if c.is_control() => {}
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_become_markup() {
        let mut canvas = Canvas::new(10.0);
        canvas.text("mono", (0.0, 0.0), Anchor::Start, "<b>&\u{0}\"");
        let svg = canvas.finish(10.0, "<t>");
        assert!(
            svg.contains(">&lt;b&gt;&amp;&quot;</text>") && svg.contains("<title>&lt;t&gt;</title>"),
            "{svg}"
        );
    }
}
