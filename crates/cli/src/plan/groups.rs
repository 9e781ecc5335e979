//! The groups of a mesh, as people read them.

use shardwise_plan::{Axis, Mesh};

/// Groups and ranks that are written out before and after `..`.
const SHOWN: usize = 4;

/// One line for each axis that has more than one rank.
pub fn describe(mesh: &Mesh) -> String {
    let axes = [("pipeline", Axis::Pipeline), ("data", Axis::Data), ("tensor", Axis::Tensor)];
    let line = |(name, axis): (&str, Axis)| {
        (mesh.degree(axis) > 1).then(|| {
            let groups: Vec<_> =
                mesh.groups(axis).iter().map(|group| format!("[{}]", shortened(group))).collect();
            format!("  {name:<10}{}\n", shortened(&groups))
        })
    };
    let lines: String = axes.into_iter().filter_map(line).collect();
    if lines.is_empty() { lines } else { format!("groups of ranks\n{lines}") }
}

fn shortened<T: ToString>(items: &[T]) -> String {
    let text = |items: &[T]| items.iter().map(T::to_string).collect::<Vec<_>>().join(" ");
    if items.len() <= 2 * SHOWN {
        return text(items);
    }
    format!("{} .. {}", text(&items[..SHOWN]), text(&items[items.len() - 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_meshes_are_written_out_and_large_ones_shortened() {
        assert_eq!(describe(&Mesh::new(1, 1, 1).unwrap()), "");
        assert_eq!(
            describe(&Mesh::new(8, 2, 2).unwrap()),
            "groups of ranks\n  pipeline  [0 4] [1 5] [2 6] [3 7]\n  data      [0 2] [1 3] [4 6] [5 7]\n  \
             tensor    [0 1] [2 3] [4 5] [6 7]\n"
        );
        assert_eq!(
            describe(&Mesh::new(64, 1, 4).unwrap()),
            "groups of ranks\n  data      [0 4 8 12 .. 60] [1 5 9 13 .. 61] [2 6 10 14 .. 62] [3 7 11 15 .. 63]\n  \
             tensor    [0 1 2 3] [4 5 6 7] [8 9 10 11] [12 13 14 15] .. [60 61 62 63]\n"
        );
    }
}
