//! What a schedule looks like: time runs to the right, a row is a stage.

use std::fmt::Write;

use super::action::Action;
use super::simulate::{Simulation, Span};

/// The timeline as plain text, one column for each `unit` of time. `.` is idle, `--` goes on with what began before.
///
/// ```text
/// stage 0   F0 F1 .  .  B0 -- B1 --
/// stage 1   .  F0 B0 -- F1 B1 -- .
/// ```
pub fn timeline(simulation: &Simulation, unit: f64) -> String {
    let column = |time: f64| (time / unit).round() as usize;
    let spans = || simulation.spans.iter().flatten();
    let width = spans().map(|span| span.action.to_string().len()).max().unwrap_or(1) + 1;
    let digits = simulation.spans.len().saturating_sub(1).to_string().len();
    let mut text = String::new();
    for (stage, spans) in simulation.spans.iter().enumerate() {
        let mut cells = vec![".".to_owned(); column(simulation.makespan)];
        for Span { action, start, end } in spans {
            let (first, last) = (column(*start), column(*end));
            for (i, cell) in cells.iter_mut().enumerate().take(last).skip(first) {
                *cell = if i == first { action.to_string() } else { "-".repeat(width - 1) };
            }
        }
        let row: String = cells.iter().map(|cell| format!("{cell:<width$}")).collect();
        let _ = writeln!(text, "stage {stage:<digits$}   {}", row.trim_end());
    }
    text
}

/// Kinds of computation: name and fill.
const KINDS: [(&str, &str); 4] = [
    ("forward", "#8fb8de"),
    ("backward", "#a5cf9c"),
    ("input gradient", "#7cc4b8"),
    ("weight gradients", "#e3c977"),
];

const UNIT: f64 = 30.0;
const ROW: f64 = 28.0;
const LEFT: f64 = 70.0;
const TOP: f64 = 40.0;

/// The timeline as an SVG image. Later chunks of a stage are paler.
pub fn svg(simulation: &Simulation, title: &str) -> String {
    let spans = || simulation.spans.iter().flatten();
    // The shortest computation gets a label's room.
    let shortest =
        spans().map(|span| span.end - span.start).filter(|&time| time > 0.0).fold(f64::INFINITY, f64::min);
    let scale = if shortest.is_finite() { UNIT / shortest } else { UNIT };
    let num_chunks =
        spans().filter_map(|span| span.action.piece()).map(|piece| piece.chunk + 1).max().unwrap_or(1);
    let width = (LEFT + simulation.makespan * scale + 20.0).max(560.0);
    let legend = TOP + simulation.spans.len() as f64 * ROW + 14.0;
    let height = legend + 30.0;
    let mut image = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"8\" y=\"22\" font-size=\"14\">{}</text>\n",
        escaped(title)
    );
    let rect = |image: &mut String, [x, y, w]: [f64; 3], kind: usize, opacity: f64| {
        let fill = KINDS[kind].1;
        let _ = write!(
            image,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{w:.1}\" height=\"{:.0}\" fill=\"{fill}\" fill-opacity=\"{opacity:.2}\" \
             stroke=\"#444\" stroke-width=\"0.5\"/>",
            ROW - 4.0
        );
    };
    for (stage, spans) in simulation.spans.iter().enumerate() {
        let y = TOP + stage as f64 * ROW;
        let _ = writeln!(image, "<text x=\"8\" y=\"{:.1}\">stage {stage}</text>", y + 16.0);
        for Span { action, start, end } in spans {
            let (x, w) = (LEFT + start * scale, (end - start) * scale);
            let chunk = action.piece().map_or(0, |piece| piece.chunk);
            rect(&mut image, [x, y, w], kind(*action), 1.0 - 0.7 * chunk as f64 / num_chunks as f64);
            let label = action.to_string();
            let _ = writeln!(
                image,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                x + w / 2.0,
                y + 16.0,
                escaped(&label[1..])
            );
        }
    }
    for (i, (name, _)) in KINDS.iter().enumerate() {
        let x = LEFT + 120.0 * i as f64;
        rect(&mut image, [x, legend, 24.0], i, 1.0);
        let _ = writeln!(image, "<text x=\"{:.1}\" y=\"{:.1}\">{name}</text>", x + 30.0, legend + 16.0);
    }
    image + "</svg>\n"
}

fn kind(action: Action) -> usize {
    match action {
        Action::Forward(_) => 0,
        Action::BackwardInput(_) => 2,
        Action::BackwardWeight(_) => 3,
        _ => 1,
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
