//! What ranks are called.
//!
//! A number says little where ranks differ in what they hold: on a mesh of more than the data axis a rank is called by its
//! place too, as in `rank 3 (pipeline stage 1, data 0, tensor 1)`.

use std::collections::BTreeSet;

use shardwise_plan::{Axis, Coordinates, Mesh};

/// `rank 3`, with its place on the mesh.
pub fn name(mesh: &Mesh, rank: usize) -> String {
    match place(mesh, rank) {
        Some(place) => format!("rank {rank} ({place})"),
        None => format!("rank {rank}"),
    }
}

fn place(mesh: &Mesh, rank: usize) -> Option<String> {
    let has_axes = mesh.degree(Axis::Pipeline) * mesh.degree(Axis::Tensor) > 1;
    (has_axes && rank < mesh.world_size()).then(|| {
        let Coordinates { pipeline, data, tensor } = mesh.coordinates(rank);
        format!("pipeline stage {pipeline}, data {data}, tensor {tensor}")
    })
}

/// What a rank said of others (``rank `3` stalled``), with the place of each where it is first named.
pub fn placed(mesh: &Mesh, text: &str) -> String {
    const WORD: &str = "rank ";
    let mut named = BTreeSet::new();
    let (mut out, mut rest) = (String::new(), text);
    while let Some(at) = rest.find(WORD) {
        let starts_word = !rest[..at].ends_with(char::is_alphanumeric);
        let after = &rest[at + WORD.len()..];
        let quote = if after.starts_with('`') { "`" } else { "" };
        let digits = after[quote.len()..].chars().take_while(char::is_ascii_digit).count();
        let end = at + WORD.len() + quote.len() + digits;
        let number = rest[end - digits..end].parse().ok();
        let closed = rest[end..].starts_with(quote);
        let end = if closed { end + quote.len() } else { end };
        out += &rest[..end];
        if let Some(rank) = number.filter(|_| starts_word && closed)
            && let Some(place) = place(mesh, rank)
            && named.insert(rank)
        {
            out += &format!(" ({place})");
        }
        rest = &rest[end..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_of_a_mesh_are_called_by_their_place() {
        let mesh = Mesh::new(8, 2, 2).unwrap();
        assert_eq!(name(&mesh, 5), "rank 5 (pipeline stage 1, data 0, tensor 1)");
        assert_eq!(name(&Mesh::new(8, 1, 1).unwrap(), 5), "rank 5");
    }

    #[test]
    fn what_ranks_say_of_others_is_completed_once_for_each() {
        let mesh = Mesh::new(4, 2, 2).unwrap();
        let stalled =
            "rank `3` stalled: rank `0` waited `5` s in barrier (group `world`); rank `3` is at fault";
        assert_eq!(
            placed(&mesh, stalled),
            "rank `3` (pipeline stage 1, data 0, tensor 1) stalled: rank `0` (pipeline stage 0, data 0, tensor 0) waited `5` s in \
             barrier (group `world`); rank `3` is at fault"
        );
        assert_eq!(placed(&mesh, "rank 1 is gone"), "rank 1 (pipeline stage 0, data 0, tensor 1) is gone");
        for same in [
            "",
            "rank",
            "rank ",
            "rank `",
            "rank `1",
            "prank 1",
            "rank x",
            "rank 9",
            "ranks 1 and 2",
            "größe rank `é`",
        ] {
            assert_eq!(placed(&mesh, same), same);
        }
        assert_eq!(placed(&Mesh::new(4, 1, 1).unwrap(), stalled), stalled);
    }
}
