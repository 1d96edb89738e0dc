// SPDX-License-Identifier: Apache-2.0

//! The stages of a start as a picture.

use std::fmt::Write;

const WIDTH: f64 = 920.0;
const LEFT: f64 = 250.0;
const RIGHT: f64 = 90.0;
const ROW: f64 = 26.0;
const TOP: f64 = 44.0;
const COLOURS: [&str; 4] = ["#4c78a8", "#72b7b2", "#54a24b", "#e39c37"];

/// An SVG of stages one after the other: a label and a length in milliseconds each.
pub(super) fn svg(title: &str, stages: &[(&str, f64)]) -> String {
    let total: f64 = stages.iter().map(|(_, length)| length).sum();
    let scale = (WIDTH - LEFT - RIGHT) / total.max(f64::MIN_POSITIVE);
    let step = tick(total);
    let mut rows = 0.0;
    let mut body = String::new();
    let mut at = 0.0;
    for (index, (label, length)) in stages.iter().enumerate() {
        let (x, y) = (LEFT + at * scale, TOP + rows * ROW);
        let colour = COLOURS.get(index % COLOURS.len()).unwrap_or(&"#888");
        let (text_y, end) = (y + 15.0, x + length * scale + 6.0);
        // Writing to a string cannot fail.
        let _ = writeln!(
            body,
            r#"<text x="{:.1}" y="{text_y:.1}" text-anchor="end">{label}</text>
<rect x="{x:.1}" y="{y:.1}" width="{:.1}" height="{:.1}" fill="{colour}"/>
<text x="{end:.1}" y="{text_y:.1}">{length:.1} ms</text>"#,
            LEFT - 10.0,
            (length * scale).max(1.0),
            ROW - 6.0,
        );
        at += length;
        rows += 1.0;
    }
    let bottom = TOP + rows * ROW;
    let mut axis = String::new();
    let mut mark = 0.0;
    while mark <= total {
        let x = LEFT + mark * scale;
        let _ = writeln!(
            axis,
            r##"<line x1="{x:.1}" y1="{TOP}" x2="{x:.1}" y2="{bottom:.1}" stroke="#ddd"/>
<text x="{x:.1}" y="{:.1}" text-anchor="middle" fill="#666">{mark:.0}</text>"##,
            bottom + 16.0,
        );
        mark += step;
    }
    let height = bottom + 28.0;
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0}" font-family="sans-serif" font-size="13">
<rect width="{WIDTH}" height="{height:.0}" fill="#fff"/>
<text x="{WIDTH}" y="24" dx="-10" text-anchor="end" font-size="15">{title}, {total:.1} virtual ms</text>
{axis}{body}</svg>
"##
    )
}

/// A round distance between marks, so that there are five to twelve.
fn tick(total: f64) -> f64 {
    let mut step = 1.0;
    for factor in [2.0, 2.5, 2.0].into_iter().cycle().take(30) {
        if total / step <= 12.0 {
            break;
        }
        step *= factor;
    }
    step
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_round_and_neither_too_many_nor_too_few() {
        assert_eq!([8.0, 100.0, 410.0].map(tick), [1.0, 10.0, 50.0]);
        for total in [0.5, 13.0, 61.0, 1234.0, 99_999.0] {
            assert!(total / tick(total) <= 12.0, "{total}");
        }
    }

    #[test]
    fn each_stage_begins_where_the_one_before_ends() {
        let svg = svg("start", &[("a", 10.0), ("b", 30.0)]);
        let numbers = |name: &str| -> Vec<f64> {
            let rects = svg.lines().filter(|line| line.starts_with("<rect x="));
            rects
                .map(|line| {
                    let (_, rest) = line.split_once(&format!(" {name}=\"")).unwrap();
                    rest.split('"').next().unwrap().parse().unwrap()
                })
                .collect()
        };
        let (x, width) = (numbers("x"), numbers("width"));
        assert_eq!(x.len(), 2);
        assert!((x[0] + width[0] - x[1]).abs() < 0.2, "{x:?} {width:?}");
        assert!((width[1] / width[0] - 3.0).abs() < 0.01);
    }
}
