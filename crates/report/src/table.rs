//! Tables and lists for terminals, as wide as these are. Every table of every command is one of these.
//!
//! Where a table is too wide, columns leave in the order that it states, and a line below says which. Below
//! [`NARROW`] columns each row is a block of `NAME: VALUE` with everything in it.

use comfy_table::{CellAlignment, ContentArrangement, Table as Drawn, presets};

/// Terminals that are narrower get blocks instead of tables.
pub const NARROW: usize = 60;

/// A column of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its head.
    pub head: &'static str,
    /// When it leaves where there is no room: 1 is the first to go, `None` stays.
    pub leaves: Option<u8>,
    /// Whether it is aligned to the right.
    pub right: bool,
}

impl Column {
    /// Words, which stay.
    pub const fn words(head: &'static str) -> Self {
        Self { head, leaves: None, right: false }
    }

    /// Figures, which stay.
    pub const fn figures(head: &'static str) -> Self {
        Self { head, leaves: None, right: true }
    }

    /// The same, as the `place`-th to leave.
    #[must_use]
    pub const fn leaving(self, place: u8) -> Self {
        Self { leaves: Some(place), ..self }
    }
}

/// Rows under heads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Rows with a cell for each column.
    pub fn new(columns: impl Into<Vec<Column>>, rows: impl IntoIterator<Item = Vec<String>>) -> Self {
        Self { columns: columns.into(), rows: rows.into_iter().collect() }
    }

    /// Without lines between cells, at most `width` characters wide where words can be wrapped to that.
    pub fn fit(&self, width: usize) -> String {
        if width < NARROW {
            return self.blocks(width);
        }
        let mut shown: Vec<usize> = (0..self.columns.len()).collect();
        while natural_width(&mut self.drawn(&shown)) > width {
            let next = shown.iter().copied().filter(|at| self.columns[*at].leaves.is_some());
            let Some(next) = next.min_by_key(|at| self.columns[*at].leaves) else { break };
            shown.retain(|at| *at != next);
        }
        let mut table = self.drawn(&shown);
        if natural_width(&mut table) > width {
            table.set_content_arrangement(ContentArrangement::Dynamic);
            table.set_width(u16::try_from(width).unwrap_or(u16::MAX));
        }
        let left: Vec<&str> = (0..self.columns.len())
            .filter(|at| !shown.contains(at))
            .map(|at| self.columns[at].head)
            .collect();
        if left.is_empty() {
            return table.trim_fmt();
        }
        let left = format!("not shown at {width} columns: {}", left.join("; "));
        format!("{}\n{}", table.trim_fmt(), wrap(&left, width, " "))
    }

    fn drawn(&self, shown: &[usize]) -> Drawn {
        let mut table = Drawn::new();
        table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        table.set_header(shown.iter().map(|at| self.columns[*at].head));
        table.add_rows(
            self.rows.iter().map(|row| shown.iter().map(|at| row.get(*at).map_or("", String::as_str))),
        );
        for (column, at) in table.column_iter_mut().zip(shown) {
            if self.columns[*at].right {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        table
    }

    /// Every cell that is not empty on a line of its own.
    fn blocks(&self, width: usize) -> String {
        let block = |row: &Vec<String>| {
            let cells = self.columns.iter().zip(row).filter(|(_, cell)| !cell.is_empty());
            let lines = cells.map(|(column, cell)| wrap(&format!("{}: {cell}", column.head), width, ""));
            lines.collect::<Vec<_>>().join("\n")
        };
        self.rows.iter().map(block).collect::<Vec<_>>().join("\n\n")
    }

    /// All of it as Markdown.
    pub fn markdown(&self) -> String {
        let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        let mut text = line(self.columns.iter().map(|column| column.head.to_owned()).collect());
        let rule = |column: &Column| if column.right { "---:" } else { "---" }.to_owned();
        text.push_str(&line(self.columns.iter().map(rule).collect()));
        for row in &self.rows {
            text.push_str(&line(row.iter().map(|cell| cell.replace('|', "\\|")).collect()));
        }
        text
    }
}

/// What it takes if nothing is wrapped: two characters around each cell but behind the last.
fn natural_width(table: &mut Drawn) -> usize {
    let cells: usize = table.column_max_content_widths().iter().map(|width| usize::from(*width) + 2).sum();
    cells.saturating_sub(1)
}

/// `name  value` on a line each, values below each other; `name: value` where there is little room. A line without a
/// name goes on with what is above it.
pub fn facts(lines: &[(&str, String)], width: usize) -> String {
    let names = lines.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0).max(15) + 1;
    let line = |(name, value): &(&str, String)| match (width < NARROW, name.is_empty()) {
        (true, true) => wrap(&format!("  {value}"), width, "  "),
        (true, false) => wrap(&format!("{name}: {value}"), width, "  "),
        (false, _) => wrap(&format!("{name:<names$} {value}"), width, &" ".repeat(names + 1)),
    };
    lines.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Units that stay beside their number.
const UNITS: [&str; 11] = ["s", "min", "h", "d", "B", "kB", "MB", "GB", "TB", "%", "bits"];

/// Lines of at most `width` characters, those after the first behind `indent`. A word that is longer stays whole, so
/// that a path can be copied, and a number keeps its unit.
pub fn wrap(text: &str, width: usize, indent: &str) -> String {
    // Spaces belong to the word before them, so that what is aligned stays so.
    let mut words: Vec<String> = Vec::new();
    for word in text.split_inclusive(' ') {
        let unit = UNITS.contains(&word.trim_end_matches([' ', ',', ';', '.', ')']));
        match words.last_mut() {
            Some(last) if unit && last.trim_end().ends_with(|c: char| c.is_ascii_digit()) => {
                last.push_str(word);
            }
            _ => words.push(word.to_owned()),
        }
    }
    let mut lines = vec![String::new()];
    let mut used = 0;
    for word in words {
        let length = word.trim_end().chars().count();
        if used + length > width && lines.last().is_some_and(|line| !line.trim().is_empty()) {
            lines.push(indent.to_owned());
            used = indent.chars().count();
        }
        if let Some(line) = lines.last_mut() {
            line.push_str(&word);
        }
        used += word.chars().count();
    }
    lines.iter().map(|line| line.trim_end()).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let columns = [
            Column::words("method"),
            Column::figures("first to go").leaving(1),
            Column::figures("size"),
            Column::figures("second").leaving(2),
        ];
        let row = |cells: [&str; 4]| cells.map(str::to_owned).to_vec();
        let name = "a name of some length that is here";
        Table::new(
            columns,
            [row([name, "12345678901234567890", "5.37 GB", "1234567890"]), row(["b", "", "1 B", "2"])],
        )
    }

    #[test]
    fn columns_leave_in_their_order_and_are_named() {
        let heads = |width| {
            table()
                .fit(width)
                .lines()
                .next()
                .unwrap_or_default()
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(heads(200), "method first to go size second");
        assert_eq!(heads(70), "method size second");
        assert!(table().fit(70).ends_with("not shown at 70 columns: first to go"), "{}", table().fit(70));
        assert!(!table().fit(200).contains("not shown"));
    }

    #[test]
    fn nothing_is_wider_than_it_may_be() {
        for width in 20..130 {
            let fitted = table().fit(width);
            assert!(fitted.lines().all(|line| line.chars().count() <= width), "{width}:\n{fitted}");
        }
        // A table that fits to the character is not cut.
        let exact = table().fit(200).lines().map(|line| line.chars().count()).max().unwrap_or(0);
        assert!(!table().fit(exact).contains("not shown") && table().fit(exact - 1).contains("not shown"));
    }

    #[test]
    fn little_room_makes_blocks_of_everything() {
        let blocks = table().fit(59);
        assert!(
            blocks.starts_with(
                "method: a name of some length that is here\nfirst to go: 12345678901234567890\n"
            )
        );
        assert!(blocks.ends_with("\n\nmethod: b\nsize: 1 B\nsecond: 2"), "{blocks}");
    }

    #[test]
    fn long_words_stay_whole() {
        let path = "/a/very/long/path/that/nobody/wants/to/see/broken";
        assert_eq!(wrap(&format!("it lies in {path} now"), 20, "  "), format!("it lies in\n  {path}\n  now"));
        assert_eq!(wrap("it took about 231 s, more", 18, ""), "it took about\n231 s, more");
        let lines = facts(&[("files", "1.00 GB in 2".to_owned()), ("", "more".to_owned())], 80);
        assert_eq!(lines, "files            1.00 GB in 2\n                 more");
        assert_eq!(facts(&[("files", "2".to_owned())], 40), "files: 2");
    }
}
