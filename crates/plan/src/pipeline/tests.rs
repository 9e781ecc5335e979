//! Every schedule that can be built, checked and simulated; and schedules that are none.

use super::*;

const ZERO: f64 = 1e-9;

/// All kinds for one size; those that cannot be are left out.
fn kinds(num_stages: usize, num_microbatches: usize) -> impl Iterator<Item = (ScheduleKind, Schedule)> {
    let interleaved = (1..=4).map(|num_chunks| ScheduleKind::Interleaved { num_chunks });
    [ScheduleKind::GPipe, ScheduleKind::OneForwardOneBackward, ScheduleKind::ZeroBubble]
        .into_iter()
        .chain(interleaved)
        .filter_map(move |kind| match Schedule::new(kind, num_stages, num_microbatches) {
            Ok(schedule) => Some((kind, schedule)),
            Err(ScheduleError::TooFewMicrobatches { .. }) if num_microbatches < num_stages => None,
            Err(error) => panic!("{kind} {num_stages} {num_microbatches}: {error}"),
        })
}

fn sizes() -> impl Iterator<Item = (usize, usize)> {
    (1..=8).flat_map(|num_stages| (1..=32).map(move |num_microbatches| (num_stages, num_microbatches)))
}

fn play(schedule: &Schedule, transport: Transport) -> Simulation {
    schedule.simulate(&Durations::unit(schedule.num_parts()), transport).unwrap()
}

#[test]
fn every_schedule_is_complete_and_in_order() {
    for (s, m) in sizes() {
        for (kind, schedule) in kinds(s, m) {
            schedule.validate().unwrap_or_else(|error| panic!("{kind} {s} {m}: {error}"));
        }
    }
}

#[test]
fn no_schedule_locks_up_when_sends_wait_for_posted_receives() {
    for (s, m) in sizes() {
        for (kind, schedule) in kinds(s, m) {
            let most = match kind {
                ScheduleKind::Interleaved { num_chunks: 2.. } => m.div_ceil(m / s) - s + 1,
                _ => 1,
            };
            assert!(schedule.receives_to_post().unwrap() <= most, "{kind} {s} {m}");
            // With that it takes no longer than with buffers, and more room does no harm.
            let makespan = |transport| play(&schedule, transport).makespan;
            if most == 1 {
                let rendezvous = makespan(Transport::Rendezvous { posted: 1 });
                assert!((rendezvous - makespan(Transport::Buffered)).abs() < ZERO, "{kind} {s} {m}");
            }
            makespan(Transport::Rendezvous { posted: most + 1 });
        }
    }
}

#[test]
fn bubbles_are_those_of_the_papers() {
    for (s, m) in sizes() {
        for (kind, schedule) in kinds(s, m) {
            let simulation = play(&schedule, Transport::Buffered);
            let v = kind.num_chunks();
            let idle = (s - 1) as f64;
            match kind {
                ScheduleKind::GPipe | ScheduleKind::OneForwardOneBackward => {
                    assert!((simulation.bubble - idle / (m as f64 + idle)).abs() < ZERO, "{kind} {s} {m}");
                }
                ScheduleKind::Interleaved { .. } if m.is_multiple_of(s) => {
                    let expected = idle / ((m * v) as f64 + idle);
                    assert!(
                        (simulation.bubble - expected).abs() < ZERO,
                        "{kind} {s} {m} {}",
                        simulation.bubble
                    );
                }
                ScheduleKind::Interleaved { .. } => {}
                ScheduleKind::ZeroBubble => {
                    let plain = Schedule::new(ScheduleKind::OneForwardOneBackward, s, m).unwrap();
                    let plain = play(&plain, Transport::Buffered).bubble;
                    assert!(simulation.bubble < plain || s == 1, "{s} {m}: {} {plain}", simulation.bubble);
                    // With micro-batches for all, what is idle is a third: forward + input - weights for each stage.
                    if m >= s {
                        assert!((simulation.makespan - (3 * m) as f64 - idle).abs() < ZERO, "{s} {m}");
                    }
                }
            }
        }
    }
}

#[test]
fn stages_keep_no_more_than_they_should() {
    for (s, m) in sizes() {
        for (kind, schedule) in kinds(s, m) {
            for stage in 0..s {
                let expected = match kind {
                    ScheduleKind::GPipe => m,
                    ScheduleKind::OneForwardOneBackward | ScheduleKind::Interleaved { num_chunks: 1 } => {
                        m.min(s - stage)
                    }
                    ScheduleKind::ZeroBubble => m.min(s),
                    ScheduleKind::Interleaved { num_chunks } => {
                        let group = m.div_ceil(m / s);
                        (m * num_chunks).min((num_chunks - 1) * group + 2 * (s - stage - 1) + 1)
                    }
                };
                assert_eq!(schedule.peak_activations(stage), expected, "{kind} {s} {m} stage {stage}");
            }
        }
    }
}

#[test]
fn text_and_back() {
    for (s, m) in [(1, 1), (2, 3), (4, 8), (3, 7)] {
        for (kind, schedule) in kinds(s, m) {
            assert_eq!(schedule.to_string().parse(), Ok(schedule), "{kind} {s} {m}");
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
    }
    let schedule = Schedule::new(ScheduleKind::OneForwardOneBackward, 2, 2).unwrap();
    assert_eq!(
        schedule.to_string(),
        "stages 2 chunks 1 microbatches 2\n\
         0: F0 F0>1 F1 F1>1 B0<1 B0 B1<1 B1 TIED REDUCE STEP\n\
         1: F0<0 F0 B0 B0>0 F1<0 F1 B1 B1>0 TIED REDUCE STEP\n"
    );
    let alone = Schedule::new(ScheduleKind::OneForwardOneBackward, 1, 2).unwrap();
    assert_eq!(alone.to_string(), "stages 1 chunks 1 microbatches 2\n0: F0 B0 F1 B1 TIED REDUCE STEP\n");
    let interleaved = Schedule::new(ScheduleKind::Interleaved { num_chunks: 2 }, 2, 2).unwrap();
    assert!(interleaved.to_string().contains("0: F0 F0>1 F1 F1>1 F0.1<1 F0.1 F0.1>1 "), "{interleaved}");
    let zero = Schedule::new(ScheduleKind::ZeroBubble, 2, 2).unwrap();
    assert!(zero.to_string().contains("1: F0<0 F0 I0 B0>0 F1<0 F1 I1 B1>0 W0 W1 TIED"), "{zero}");
}

#[test]
fn what_is_no_schedule_is_refused() {
    for (text, expected) in [
        ("", "line 1: ``, expected `stages S chunks C microbatches M`"),
        ("stages 0 chunks 1 microbatches 1", "line 1: `stages 0 chunks 1 microbatches 1`, expected"),
        ("stages 2 chunks 1 microbatches 1\n0: F0", "line 2: `1` stages, expected `2`"),
        ("stages 1 chunks 1 microbatches 1\n1: F0", "line 2: expected stage `0:`"),
        ("stages 1 chunks 1 microbatches 1\n0: F+1", "line 2: `F+1` is no action"),
        ("stages 1 chunks 1 microbatches 1\n0: W1>0", "line 2: `W1>0` is no action"),
        ("stages 1 chunks 1 microbatches 1\n0: F1.0", "line 2: `F1.0` is no action"),
        ("stages 1 chunks 1 microbatches 1\n0: é", "line 2: `é` is no action"),
    ] {
        let error = text.parse::<Schedule>().unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
    let refused = |kind, s, m| Schedule::new(kind, s, m).unwrap_err().to_string();
    assert_eq!(
        refused(ScheduleKind::Interleaved { num_chunks: 2 }, 4, 3),
        "`3` micro-batches do not fill `4` interleaved stages, expected at least `4` (best a multiple of it), or at most `3` \
         stages, or another schedule"
    );
    assert!(refused(ScheduleKind::GPipe, 4, 0).contains("expected at least 1 of each"));
    assert!("1f1b:2".parse::<ScheduleKind>().unwrap_err().contains("expected `gpipe`"));
}

#[test]
fn validation_names_what_is_wrong() {
    let two = "stages 2 chunks 1 microbatches 2\n\
               0: F0 F0>1 F1 F1>1 B0<1 B0 B1<1 B1 TIED REDUCE STEP\n\
               1: F0<0 F0 B0 B0>0 F1<0 F1 B1 B1>0 TIED REDUCE STEP\n";
    assert_eq!(two.parse::<Schedule>().unwrap().validate(), Ok(()));
    for (from, to, expected) in [
        ("B1<1 B1", "B1<1", "stage `0`: `B1` is missing"),
        ("B1<1 B1", "B1<1 B1 B1", "stage `0`: `B1` is there twice"),
        ("B1<1 B1", "B1<1 W1", "stage `0`: `B1` is missing"),
        ("F1<0 F1 B1", "F1<0 F1 I1", "stage `1`: `W1` is missing"),
        ("F1<0 F1", "F1 F1<0", "stage `1`: `F1` comes before `F1<0`"),
        ("F1<0 F1", "F2<0 F1", "stage `1`: `F2<0` is out of range"),
        ("0: F0", "0: F0<1 F0", "stage `0`: `F0<1` is with the wrong stage, expected no message"),
        ("F1 F1>1", "F1 F1>0", "stage `0`: `F1>0` is with the wrong stage, expected stage `1`"),
        ("TIED REDUCE", "REDUCE TIED", "stage `0`: `REDUCE` comes before `STEP`"),
        (
            "F1<0 F1 B1 B1>0 TIED REDUCE STEP",
            "TIED REDUCE STEP F1<0 F1 B1 B1>0",
            "stage `1`: `STEP` comes before `F1<0`",
        ),
        (
            "F0 F0>1 F1 F1>1",
            "F0 F1 F1>1 F0>1",
            "stage `1`: `F0<0` gets what stage `0` sends with `F1>1`: messages of a channel arrive in the order",
        ),
        (
            "F0 F0>1 F1 F1>1 B0<1 B0",
            "F0 F1 B0<1 B0 F0>1 F1>1",
            "stage `0`: deadlock: stage 0 waits in `B0<1` for stage 1, stage 1 waits in `F0<0` for stage 0",
        ),
    ] {
        let text = two.replacen(from, to, 1);
        let error = text.parse::<Schedule>().unwrap().validate().unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}\n{text}");
    }
}

#[test]
fn synchronous_sends_without_posted_receives_lock_1f1b_up() {
    let schedule = Schedule::new(ScheduleKind::OneForwardOneBackward, 2, 4).unwrap();
    let error = schedule.simulate(&Durations::unit(2), Transport::Rendezvous { posted: 0 }).unwrap_err();
    assert_eq!(
        error.to_string(),
        "stage `0`: deadlock: stage 0 waits in `F1>1` for stage 1, stage 1 waits in `B0>0` for stage 0"
    );
    // GPipe never has both directions at once.
    let schedule = Schedule::new(ScheduleKind::GPipe, 4, 4).unwrap();
    assert!(schedule.simulate(&Durations::unit(4), Transport::Rendezvous { posted: 0 }).is_ok());
}

#[test]
fn a_message_that_nobody_sends_is_named() {
    let text = "stages 2 chunks 1 microbatches 1\n0: F0 STEP\n1: F0<0 F0 STEP\n";
    let schedule: Schedule = text.parse().unwrap();
    let error = schedule.simulate(&Durations::unit(2), Transport::Buffered).unwrap_err().to_string();
    assert_eq!(error, "stage `1`: stage 1 waits in `F0<0` for stage 0, which has come to its end");
}

#[test]
fn messages_and_uneven_stages_take_their_time() {
    let schedule = Schedule::new(ScheduleKind::OneForwardOneBackward, 2, 1).unwrap();
    let mut durations = Durations::unit(2);
    durations.transfer = 0.5;
    let makespan =
        |durations: &Durations, transport| schedule.simulate(durations, transport).unwrap().makespan;
    assert_eq!(makespan(&durations, Transport::Buffered), 7.0);
    assert_eq!(makespan(&durations, Transport::Rendezvous { posted: 1 }), 7.0);
    durations.forward[1] = 3.0;
    assert_eq!(makespan(&durations, Transport::Buffered), 9.0);
}

#[test]
fn drawings_show_the_order() {
    let schedule = Schedule::new(ScheduleKind::OneForwardOneBackward, 3, 4).unwrap();
    let simulation = play(&schedule, Transport::Buffered);
    let drawn = timeline(&simulation, 1.0);
    let expected = "\
stage 0   F0 F1 F2 .  .  .  .  B0 -- F3 B1 -- .  B2 -- .  B3 --
stage 1   .  F0 F1 .  .  B0 -- F2 B1 -- F3 B2 -- .  B3 -- .  .
stage 2   .  .  F0 B0 -- F1 B1 -- F2 B2 -- F3 B3 -- .  .  .  .
";
    let trimmed = |text: &str| text.lines().map(|line| format!("{}\n", line.trim_end())).collect::<String>();
    assert_eq!(drawn, trimmed(expected), "\n{drawn}");
    let image = svg(&simulation, "1f1b");
    assert!(image.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\"") && image.ends_with("</svg>\n"));
    assert_eq!(image.matches("<rect").count(), 1 + 3 * 8 + 4, "background, computations, legend");
    assert!(!svg(&simulation, "a<b").contains("a<b"), "text is escaped");
}
