//! In what order each stage computes.
//!
//! These are the schedules proper. Messages follow from them: an input is received before its forward, and an output is sent
//! after it.

use super::action::{Action, Piece};

/// Micro-batch `microbatch` of a stage with one chunk.
fn whole(microbatch: usize) -> Piece {
    Piece { microbatch, chunk: 0 }
}

pub(super) fn gpipe(num_stages: usize, num_microbatches: usize) -> Vec<Vec<Action>> {
    let forward = (0..num_microbatches).map(|m| Action::Forward(whole(m)));
    let backward = (0..num_microbatches).map(|m| Action::Backward(whole(m)));
    vec![forward.chain(backward).collect(); num_stages]
}

/// Forwards until the first gradient can be back, then forward and backward in turn, then the backwards that are left.
fn one_forward_one_backward_of(forwards: &[Piece], backwards: &[Piece], num_warmup: usize) -> Vec<Action> {
    let num_warmup = num_warmup.min(forwards.len());
    let (warmup, steady) = forwards.split_at(num_warmup);
    let mut actions: Vec<_> = warmup.iter().map(|&piece| Action::Forward(piece)).collect();
    for (i, &piece) in backwards.iter().enumerate() {
        actions.extend(steady.get(i).map(|&piece| Action::Forward(piece)));
        actions.push(Action::Backward(piece));
    }
    actions
}

pub(super) fn one_forward_one_backward(num_stages: usize, num_microbatches: usize) -> Vec<Vec<Action>> {
    let pieces: Vec<_> = (0..num_microbatches).map(whole).collect();
    (0..num_stages)
        .map(|stage| one_forward_one_backward_of(&pieces, &pieces, num_stages - stage - 1))
        .collect()
}

pub(super) fn interleaved(num_stages: usize, num_chunks: usize, num_microbatches: usize) -> Vec<Vec<Action>> {
    let groups = groups(num_stages, num_microbatches);
    let largest = groups.iter().map(|group| group.len()).max().unwrap_or(0);
    let through = |chunks: &[usize]| -> Vec<Piece> {
        let of_group = |group: &std::ops::Range<usize>| {
            let group = group.clone();
            chunks
                .iter()
                .flat_map(move |&chunk| group.clone().map(move |microbatch| Piece { microbatch, chunk }))
        };
        groups.iter().flat_map(of_group).collect()
    };
    let chunks: Vec<_> = (0..num_chunks).collect();
    let forwards = through(&chunks);
    let backwards = through(&chunks.iter().rev().copied().collect::<Vec<_>>());
    (0..num_stages)
        .map(|stage| {
            // A group goes through all chunks but the last; a message to the last stage and one back take a step each.
            let num_warmup = (num_chunks - 1) * largest + 2 * (num_stages - stage - 1);
            one_forward_one_backward_of(&forwards, &backwards, num_warmup)
        })
        .collect()
}

/// Consecutive micro-batches that go through a chunk before the next chunk has its turn: as many groups as there can be of at
/// least one micro-batch for each stage, the larger ones first.
fn groups(num_stages: usize, num_microbatches: usize) -> Vec<std::ops::Range<usize>> {
    let num_groups = num_microbatches / num_stages;
    let (size, larger) = (num_microbatches / num_groups, num_microbatches % num_groups);
    let mut start = 0;
    (0..num_groups)
        .map(|group| {
            let range = start..start + size + usize::from(group < larger);
            start = range.end;
            range
        })
        .collect()
}

pub(super) fn zero_bubble(num_stages: usize, num_microbatches: usize) -> Vec<Vec<Action>> {
    let of_stage = |stage: usize| {
        let num_warmup = (num_stages - stage - 1).min(num_microbatches);
        let mut actions: Vec<_> = (0..num_warmup).map(|m| Action::Forward(whole(m))).collect();
        for m in 0..num_microbatches {
            if num_warmup + m < num_microbatches {
                actions.push(Action::Forward(whole(num_warmup + m)));
            }
            actions.push(Action::BackwardInput(whole(m)));
            // The later the stage, the earlier it begins to go backward and the longer it can put off its weights: with
            // those `stage` micro-batches every stage keeps as many alive as the first does.
            actions.extend(m.checked_sub(stage).map(|m| Action::BackwardWeight(whole(m))));
        }
        let left = num_microbatches.saturating_sub(stage)..num_microbatches;
        actions.extend(left.map(|m| Action::BackwardWeight(whole(m))));
        actions
    };
    (0..num_stages).map(of_stage).collect()
}
