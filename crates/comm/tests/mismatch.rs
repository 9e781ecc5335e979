//! Ranks that call different things, give up, panic, leave or stall: every rank hears who and what.
#![allow(clippy::unwrap_used, reason = "a test that fails may panic")]

use std::sync::Mutex;
use std::time::{Duration, Instant};

use half::bf16;
use shardwise_comm::{CommError, Group, Options, Part, thread};
use shardwise_device::{Slice, SliceMut};

fn run<T: Send>(size: usize, f: impl Fn(Group) -> T + Sync) -> Vec<T> {
    thread::run_with(size, Options { deadline: Duration::from_secs(20), ..Options::default() }, f)
}

/// The text of the one error that all ranks got, and get again from their next call.
fn the_error(size: usize, f: impl Fn(&Group) -> Result<(), CommError> + Sync) -> String {
    let errors = run(size, |group| {
        let error = f(&group).unwrap_err().to_string();
        let again = Instant::now();
        assert_eq!(group.barrier().unwrap_err().to_string(), error);
        assert!(again.elapsed() < Duration::from_secs(1), "later calls fail at once");
        error
    });
    assert!(errors.windows(2).all(|pair| pair[0] == pair[1]), "{errors:#?}");
    errors.into_iter().next().unwrap()
}

#[test]
fn different_operations() {
    let text = the_error(4, |group| {
        let mut buffer = [1f32; 8];
        group.barrier()?;
        if group.group_rank() == 2 { group.barrier() } else { group.all_reduce(SliceMut::of(&mut buffer)) }
    });
    assert_eq!(
        text,
        "ranks `0` and `2` disagree in group `world`: rank `0` calls `all_reduce` number `1` of `8` x `f32`, \
         rank `2` calls `barrier` number `1`"
    );
}

#[test]
fn different_sizes() {
    let text = the_error(3, |group| {
        let mut buffer = vec![1f32; 100_000 + group.group_rank() / 2];
        group.all_reduce(SliceMut::of(&mut buffer))
    });
    assert!(text.contains("ranks `0` and `2`") && text.contains("`100000` x `f32`"), "{text}");
    assert!(text.contains("rank `2` calls `all_reduce` number `0` of `100001` x `f32`"), "{text}");
}

#[test]
fn different_types() {
    let text = the_error(2, |group| match group.group_rank() {
        0 => group.all_reduce(SliceMut::of(&mut [1f32; 8])),
        _ => group.all_reduce(SliceMut::of(&mut [bf16::ONE; 8])),
    });
    assert!(text.contains("`8` x `f32`") && text.contains("`8` x `bf16`"), "{text}");
}

#[test]
fn different_roots_and_different_groups() {
    let text = the_error(2, |group| group.broadcast(SliceMut::of(&mut [0u8; 3]), group.group_rank()));
    assert!(
        text.contains("`broadcast` number `0` from `0`") && text.contains("`broadcast` number `0` from `1`"),
        "{text}"
    );
    let text = the_error(3, |group| {
        let ranks = if group.group_rank() == 1 { [1, 2] } else { [0, 1] };
        group.subgroup("pair", &ranks).map(drop)
    });
    assert!(text.contains("ranks `0` and `1` disagree") && text.contains("`subgroup` number `0`"), "{text}");
}

#[test]
fn messages_that_do_not_match() {
    let text = the_error(2, |group| match group.group_rank() {
        0 => group.send(Slice::of(&[1f32; 3]), 1).and_then(|()| group.barrier()),
        _ => group.recv(SliceMut::of(&mut [0f32; 4]), 0),
    });
    assert_eq!(
        text,
        "ranks `1` and `0` disagree in group `world`: rank `1` calls `recv` number `0` from `0` of `4` x `f32`, \
         rank `0` calls `send` number `0` to `1` of `3` x `f32`"
    );
}

#[test]
fn waiting_for_each_other_is_seen_at_once() {
    let started = Instant::now();
    let text = the_error(2, |group| match group.group_rank() {
        0 => group.all_reduce(SliceMut::of(&mut [1f32; 8])),
        _ => group.recv(SliceMut::of(&mut [1f32; 8]), 0),
    });
    assert!(text.contains("rank `1` calls `recv` number `0` from `0`"), "{text}");
    assert!(text.contains("rank `0` calls `all_reduce` number `0`"), "{text}");
    let text = the_error(2, |group| {
        let mut buffer = [0u8; 4];
        group.recv(SliceMut::of(&mut buffer), 1 - group.group_rank())
    });
    assert!(text.contains("calls `recv` number `0` from `0`") && text.contains("from `1`"), "{text}");
    let text = the_error(2, |group| match group.group_rank() {
        0 => group.barrier(),
        _ => group.send(Slice::of(&vec![0u8; 2 << 20]), 0),
    });
    assert!(
        text.contains("`send` number `0` to `0` of `2097152` x `u8`") && text.contains("`barrier`"),
        "{text}"
    );
    assert!(started.elapsed() < Duration::from_secs(5));
}

/// A refused call is the caller's own error; to the others its rank has given up.
fn refused(f: impl Fn(&Group) -> Result<(), CommError> + Sync) -> String {
    let errors = run(2, |group| {
        let result = if group.group_rank() == 1 { f(&group) } else { group.barrier() };
        result.unwrap_err().to_string()
    });
    assert_eq!(errors[0], format!("rank `1` gave up: {}", errors[1]));
    errors.into_iter().nth(1).unwrap()
}

#[test]
fn arguments_that_cannot_be_right() {
    let text = refused(|group| group.all_reduce(SliceMut::of(&mut [1u8; 8])));
    assert_eq!(
        text,
        "`all_reduce` in group `world`: the input is `u8`, expected `f32`, `bf16` or `f16`: bytes have no sum"
    );
    let text = refused(|group| {
        group.reduce_scatter(&[Part::Data(Slice::of(&[1u8; 4]))], SliceMut::of(&mut [0u8; 2]))
    });
    assert!(text.contains("bytes have no sum"), "{text}");
    let text = refused(|group| {
        group.reduce_scatter(
            &[Part::Data(Slice::of(&[1f32; 4])), Part::Zeros(1)],
            SliceMut::of(&mut [0f32; 2]),
        )
    });
    assert_eq!(
        text,
        "`reduce_scatter` in group `world` of `2` ranks: the input has `5` elements, expected `4`"
    );
    let text = refused(|group| {
        let parts = [Part::Data(Slice::of(&[1f32; 2])), Part::Data(Slice::of(&[bf16::ONE; 2]))];
        group.reduce_scatter(&parts, SliceMut::of(&mut [0f32; 2]))
    });
    assert_eq!(text, "`reduce_scatter` in group `world`: a part is `bf16`, expected `f32`");
    let text = refused(|group| {
        group.reduce_scatter(&[Part::Data(Slice::of(&[1f32; 4]))], SliceMut::of(&mut [bf16::ONE; 2]))
    });
    assert_eq!(text, "`reduce_scatter` in group `world`: the shard is `bf16`, expected `f32`");
    let text = refused(|group| group.all_gather(Slice::of(&[1f32; 4]), SliceMut::of(&mut [0f32; 9])));
    assert!(text.contains("the result has `9` elements, expected `8`"), "{text}");
    let text = refused(|group| group.all_gather(Slice::of(&[1f32; 4]), SliceMut::of(&mut [0u8; 8])));
    assert!(text.contains("the result is `u8`, expected `f32`"), "{text}");
    let text = refused(|group| group.all_gather_in_place(SliceMut::of(&mut [0f32; 9])));
    assert_eq!(
        text,
        "`all_gather` in group `world`: `9` elements, expected a multiple of the group size `2`"
    );
    let text = refused(|group| group.all_to_all(Slice::of(&[1f32; 3]), SliceMut::of(&mut [0f32; 3])));
    assert_eq!(
        text,
        "`all_to_all` in group `world`: `3` elements, expected a multiple of the group size `2`"
    );
    let text = refused(|group| group.broadcast(SliceMut::of(&mut [0f32; 3]), 2));
    assert_eq!(text, "`broadcast` in group `world` of `2` ranks: no other rank `2`");
    let text = refused(|group| group.recv(SliceMut::of(&mut [0f32; 3]), 1));
    assert!(text.contains("no other rank `1`"), "{text}");
    for ranks in [&[][..], &[0, 0], &[0, 2]] {
        let text = refused(|group| group.subgroup("odd", ranks).map(drop));
        assert_eq!(
            text,
            format!("subgroup `odd` of group `world`: ranks {ranks:?} are not distinct ranks of [0, 1]")
        );
    }
}

#[test]
fn only_zeros_need_a_type_where_the_shard_has_another() {
    let sums = run(2, |group| {
        let ones = [bf16::ONE; 4];
        let parts = match group.group_rank() {
            0 => vec![Part::Data(Slice::of(&ones))],
            _ => vec![Part::Zeros(4), Part::Data(Slice::of(&ones[..0]))],
        };
        let mut shard = [0f32; 2];
        group.reduce_scatter(&parts, SliceMut::of(&mut shard)).map(|()| shard)
    });
    assert_eq!(sums[1].as_ref().unwrap(), &[1.0, 1.0]);
}

#[test]
fn giving_up_reaches_those_who_wait_and_those_who_come_later() {
    let errors = run(3, |group| {
        match group.group_rank() {
            0 => group.poison("out of data"),
            1 => {}
            _ => std::thread::sleep(Duration::from_millis(300)),
        }
        group.all_reduce(SliceMut::of(&mut [1f32; 8])).unwrap_err().to_string()
    });
    assert!(errors.iter().all(|text| text == "rank `0` gave up: out of data"), "{errors:?}");
}

#[test]
fn a_long_reason_is_cut_not_lost() {
    let errors = run(2, |group| {
        if group.group_rank() == 0 {
            group.poison(&"ä".repeat(5000));
        }
        group.barrier().unwrap_err().to_string()
    });
    assert!(errors[1].starts_with("rank `0` gave up: ää") && errors[1].len() > 500, "{}", errors[1]);
}

#[test]
fn a_panicking_rank_hangs_nobody() {
    let heard = Mutex::new(Vec::new());
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        run(3, |group| {
            assert!(group.group_rank() != 1, "a bug in rank 1");
            let error = group.barrier().unwrap_err().to_string();
            heard.lock().unwrap().push(error);
        })
    }));
    assert_eq!(*outcome.unwrap_err().downcast::<&str>().unwrap(), "a bug in rank 1");
    assert_eq!(*heard.lock().unwrap(), ["rank `1` gave up: its thread panicked: a bug in rank 1"; 2]);
}

#[test]
fn an_error_in_a_subgroup_is_everyones() {
    let gate = std::sync::Barrier::new(4);
    let errors = run(4, |world| {
        let pairs = [[0, 1], [2, 3]].map(|ranks| world.subgroup("pair", &ranks).unwrap());
        let pair = pairs.into_iter().flatten().next().unwrap();
        gate.wait();
        if world.group_rank() == 3 {
            pair.poison("enough");
        }
        let inside = pair.group_rank() == 0;
        let result = if inside { pair.barrier() } else { world.barrier() };
        result.unwrap_err().to_string()
    });
    assert!(errors.iter().all(|text| text == "rank `3` gave up: enough"), "{errors:?}");
}

#[test]
fn a_rank_that_left_is_named() {
    let errors = run(3, |group| {
        if group.group_rank() == 1 {
            group.barrier().unwrap();
            return None;
        }
        // One of the others may be told while it still wakes up from the barrier: the first to miss rank 1 tells all.
        let met = group.barrier();
        Some(met.and_then(|()| group.all_reduce(SliceMut::of(&mut [1f32; 8]))).unwrap_err())
    });
    for error in errors.into_iter().flatten() {
        assert!(matches!(error, CommError::Left { rank: 1, .. }), "{error}");
    }
    let errors = run(2, |group| {
        let to = 1 - group.group_rank();
        (group.group_rank() == 0).then(|| {
            std::thread::sleep(Duration::from_millis(50));
            group
                .send(Slice::of(&[1u8]), to)
                .and_then(|()| group.recv(SliceMut::of(&mut [1u8]), to))
                .unwrap_err()
        })
    });
    assert!(matches!(errors[0], Some(CommError::Left { rank: 1, .. })), "{errors:?}");
}

#[test]
fn what_a_rank_did_before_it_left_still_counts() {
    let sums = run(4, |group| {
        // Rank 3 is gone before the others are out of the call.
        let mut buffer = vec![1f32; 300_000];
        group.all_reduce(SliceMut::of(&mut buffer)).map(|()| buffer[299_999])
    });
    assert!(sums.iter().all(|sum| *sum.as_ref().unwrap() == 4.0));
}

#[test]
fn a_stalled_rank_is_named_not_those_who_wait_for_it() {
    let options = Options { deadline: Duration::from_millis(700), ..Options::default() };
    let (gate, opened) = (std::sync::Barrier::new(4), Instant::now());
    let errors = thread::run_with(4, options, |world| {
        let pair = world.subgroup("pair", &[2, 3]).unwrap();
        gate.wait();
        let error = match world.group_rank() {
            // Waits in the world for rank 2, which waits in the pair for rank 3, which does not come.
            0 | 1 => world.barrier().unwrap_err(),
            2 => {
                std::thread::sleep(Duration::from_millis(200));
                pair.unwrap().all_gather_in_place(SliceMut::of(&mut [0u8; 2])).unwrap_err()
            }
            _ => {
                std::thread::sleep(Duration::from_millis(2500));
                pair.unwrap().all_gather_in_place(SliceMut::of(&mut [0u8; 2])).unwrap_err()
            }
        };
        (error, opened.elapsed())
    });
    for (rank, (error, after)) in errors.iter().enumerate() {
        assert!(matches!(error, CommError::Stalled { rank: 3, .. }), "{error}");
        assert!(rank == 3 || *after < Duration::from_secs(5), "{after:?}");
    }
    let text = errors[0].0.to_string();
    assert!(text.starts_with("rank `3` stalled: rank `") && text.contains("waited `0.7` s in `"), "{text}");
}
