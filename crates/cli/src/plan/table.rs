//! Tables of plain text.

/// Columns as wide as their widest cell; the first `num_left` stand left, the others right.
pub fn table(rows: &[Vec<String>], num_left: usize) -> String {
    let num_columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(String::len).max().unwrap_or(0);
    let widths: Vec<_> = (0..num_columns).map(width).collect();
    rows.iter().fold(String::new(), |text, row| {
        let cell = |(column, cell): (usize, &String)| match column < num_left {
            true => format!("{cell:<w$}", w = widths[column]),
            false => format!("{cell:>w$}", w = widths[column]),
        };
        let line = row.iter().enumerate().map(cell).collect::<Vec<_>>().join("  ");
        text + line.trim_end() + "\n"
    })
}
