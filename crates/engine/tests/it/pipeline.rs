//! Pipelines held against what can be written down: the gradient of a linear model, the order of work, what is alive.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use shardwise_device::DType;
use shardwise_engine::{
    Batch, BoxError, Context, Engine, EngineError, EngineOptions, Layer, ParamSource, Params, Phase,
    PipelineOptions, RandomInit, ops::linear,
};
use shardwise_plan::pipeline::{Action, Schedule, ScheduleKind, loss_turn};
use shardwise_plan::{Init, LayerSpec, LossTurn, ParamSpec, ZeroStage};
use shardwise_torch::{Kind, Tensor, set_num_threads};
use shardwise_zero::{Direction, Optimizer, SgdOptions};

use crate::runs::{options, weights};
use crate::stack::{on_mesh, tap};

const SCHEDULES: [ScheduleKind; 4] = [
    ScheduleKind::GPipe,
    ScheduleKind::OneForwardOneBackward,
    ScheduleKind::Interleaved { num_chunks: 2 },
    ScheduleKind::ZeroBubble,
];

fn plain_sgd(stage: ZeroStage, accum: usize, schedule: ScheduleKind) -> EngineOptions {
    let mut options = options(stage, DType::F32);
    let sgd = SgdOptions { momentum: 0.0, dampening: 0.0, direction: Direction::Momentum, weight_decay: 0.0 };
    options.zero.optimizer = Optimizer::Sgd(sgd);
    options.zero.groups.clear();
    options.zero.grad_accum_steps = accum;
    options.pipeline = PipelineOptions { schedule, stages: None };
    options
}

/// `y = x W^T`.
struct Matrix {
    name: &'static str,
    /// Layers of the same are tied.
    param: &'static str,
}

impl Layer for Matrix {
    fn spec(&self) -> LayerSpec {
        let weight =
            ParamSpec { key: "weight".into(), ..ParamSpec::new("", self.param, &[2, 2], Init::Zeros) };
        LayerSpec { name: self.name.into(), params: vec![weight] }
    }

    fn forward(&self, _: &Context<'_>, params: &Params<'_>, x: &Tensor) -> Result<Tensor, EngineError> {
        Ok(x.f_matmul(&params.get("weight")?.f_tr()?)?)
    }
}

/// The mean over the rows of `target . x`.
struct Score;

impl Layer for Score {
    fn spec(&self) -> LayerSpec {
        LayerSpec { name: "score".into(), params: vec![] }
    }

    fn forward(&self, context: &Context<'_>, _: &Params<'_>, x: &Tensor) -> Result<Tensor, EngineError> {
        let target = context.target.expect("never only asked");
        Ok(x.f_mul(target)?.f_sum(Kind::Float)?.f_div_scalar(x.size()[0])?)
    }
}

type Matrix2 = [[f64; 2]; 2];

const A: Matrix2 = [[1.0, -2.0], [3.0, 1.0]];
const B: Matrix2 = [[2.0, 1.0], [-1.0, 4.0]];

/// Gives the two matrices.
struct Given;

impl ParamSource for Given {
    fn fill(&mut self, param: &ParamSpec, range: Range<usize>, out: &mut [f32]) -> Result<(), BoxError> {
        let values = if param.name == "a" { A } else { B };
        let flat: Vec<f32> = values.as_flattened().iter().map(|&x| x as f32).collect();
        out.copy_from_slice(&flat[range]);
        Ok(())
    }
}

const NUM_ROWS: usize = 8;

/// A row's input and target: small whole numbers.
fn row(i: usize) -> ([f64; 2], [f64; 2]) {
    let i = i as f64;
    ([i - 3.0, 2.0 - i % 3.0], [1.0 + i % 2.0, i % 4.0 - 1.0])
}

fn times(m: Matrix2, x: [f64; 2]) -> [f64; 2] {
    [m[0][0] * x[0] + m[0][1] * x[1], m[1][0] * x[0] + m[1][1] * x[1]]
}

fn transposed(m: Matrix2) -> Matrix2 {
    [[m[0][0], m[1][0]], [m[0][1], m[1][1]]]
}

/// `sum += t x^T`
fn add_outer(sum: &mut Matrix2, t: [f64; 2], x: [f64; 2]) {
    for (row, t) in sum.iter_mut().zip(t) {
        row.iter_mut().zip(x).for_each(|(sum, x)| *sum += t * x);
    }
}

/// Loss and gradients of `mean(t . A B A x)`, by hand.
fn by_hand() -> (f64, Matrix2, Matrix2) {
    let (mut loss, mut da, mut db) = (0.0, [[0.0; 2]; 2], [[0.0; 2]; 2]);
    for (x, t) in (0..NUM_ROWS).map(row) {
        let ax = times(A, x);
        let bax = times(B, ax);
        let y = times(A, bax);
        let at = times(transposed(A), t);
        let bat = times(transposed(B), at);
        loss += t[0] * y[0] + t[1] * y[1];
        add_outer(&mut da, t, bax);
        add_outer(&mut db, at, ax);
        add_outer(&mut da, bat, x);
    }
    let mean = |m: Matrix2| m.map(|row| row.map(|x| x / NUM_ROWS as f64));
    (loss / NUM_ROWS as f64, mean(da), mean(db))
}

/// All numbers here are whole, or whole over a power of two, and small: nothing is rounded, so a wrong scale or a lost micro-batch
/// shows in every digit. The first and the last stage hold a tied parameter.
#[test]
fn the_gradient_is_exactly_that_of_pencil_and_paper() {
    let (loss, da, db) = by_hand();
    let squares = da.iter().chain(&db).flatten().map(|x| x * x).sum::<f64>();
    for mesh in [[1, 1, 1], [2, 1, 1], [3, 1, 1], [4, 1, 1], [2, 2, 1], [2, 1, 2], [2, 2, 2]] {
        for schedule in SCHEDULES.into_iter().filter(|schedule| mesh[0] * schedule.num_chunks() <= 4) {
            for (stage, accum) in ZeroStage::ALL.into_iter().flat_map(|stage| [(stage, 2), (stage, 4)]) {
                let what = format!("{mesh:?}, {schedule}, stage {stage}, {accum} micro-batches");
                let ends = on_mesh(mesh, |ranks| {
                    set_num_threads(1);
                    let layers: Vec<Box<dyn Layer>> = vec![
                        Box::new(Matrix { name: "first", param: "a" }),
                        Box::new(Matrix { name: "second", param: "b" }),
                        Box::new(Matrix { name: "third", param: "a" }),
                        Box::new(Score),
                    ];
                    let data = ranks.at().data;
                    let options = plain_sgd(stage, accum, schedule);
                    let mut engine = Engine::new(layers, options, ranks, &mut Given).unwrap();
                    let rows = NUM_ROWS / (mesh[1] * accum);
                    let batch = |microbatch: usize| {
                        let first = (microbatch * mesh[1] + data) * rows;
                        let rows: Vec<_> = (first..first + rows).map(row).collect();
                        let tensor =
                            |values: Vec<f64>| Tensor::from_slice(&values).view([-1, 2]).to_kind(Kind::Float);
                        let input = tensor(rows.iter().flat_map(|row| row.0).collect());
                        let target = tensor(rows.iter().flat_map(|row| row.1).collect());
                        Ok(Batch { input, target, first_row: first as u64 })
                    };
                    let report = engine.train_step(0.5, batch).unwrap();
                    let mut after = weights(&mut engine);
                    after.sort_by(|a, b| a.0.cmp(&b.0));
                    (report, after)
                });
                for (report, after) in ends {
                    assert_eq!(report.loss, loss, "{what}");
                    assert_eq!(report.step.grad_norm, squares.sqrt(), "{what}");
                    for ((name, after), (before, grad)) in after.iter().zip([(A, da), (B, db)]) {
                        let expected: Vec<f32> = before
                            .iter()
                            .zip(&grad)
                            .flat_map(|(w, g)| [0, 1].map(|i| (w[i] - 0.5 * g[i]) as f32))
                            .collect();
                        assert_eq!(*after, expected, "`{name}`, {what}");
                    }
                }
            }
        }
    }
}

/// What a stage has done, as an action's letter, with a micro-batch and a chunk.
type Event = (char, usize, usize);

/// What the layers of one rank note down.
#[derive(Clone, Default)]
struct Notes {
    events: Arc<Mutex<Vec<Event>>>,
    num_alive: Arc<AtomicUsize>,
    most_alive: Arc<AtomicUsize>,
}

/// Counts among the living while it is there.
struct Alive(Notes);

impl Alive {
    fn new(notes: &Notes) -> Self {
        let num_alive = notes.num_alive.fetch_add(1, Ordering::Relaxed) + 1;
        notes.most_alive.fetch_max(num_alive, Ordering::Relaxed);
        Alive(notes.clone())
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.num_alive.fetch_sub(1, Ordering::Relaxed);
    }
}

/// `x W^T W^T * scale`, a whole part of the model, which notes down when what is computed. The last one gives a loss.
///
/// The gradient of the matrix may wait: then nobody but the engine sees when it is made.
struct Noting {
    name: String,
    chunk: usize,
    is_last: bool,
    notes: Notes,
}

impl Layer for Noting {
    fn spec(&self) -> LayerSpec {
        LayerSpec {
            name: self.name.clone(),
            params: vec![
                ParamSpec::new(&self.name, "matrix", &[2, 2], Init::Ones),
                ParamSpec::new(&self.name, "scale", &[1], Init::Ones),
            ],
        }
    }

    fn forward(&self, context: &Context<'_>, params: &Params<'_>, x: &Tensor) -> Result<Tensor, EngineError> {
        let microbatch = context.random.expect("it learns").first_row as usize;
        let note = |letter| {
            let (notes, chunk) = (self.notes.clone(), self.chunk);
            move || notes.events.lock().unwrap().push((letter, microbatch, chunk))
        };
        note('F')();
        let (input_grad, weight_grad) = (note('I'), note('W'));
        let matrix = params.get("matrix")?;
        // Goes with the graph.
        let alive = Arc::new(Alive::new(&self.notes));
        let same = alive.clone();
        let x = tap(x, move |grad| {
            input_grad();
            let Alive(_) = &*same;
            Ok(grad)
        })?;
        let scale = tap(params.get("scale")?, move |grad| {
            weight_grad();
            let Alive(_) = &*alive;
            Ok(grad)
        })?;
        let twice = linear(context, &linear(context, &x, matrix, None)?, matrix, None)?;
        let y = twice.f_mul(&scale)?;
        Ok(if self.is_last { y.f_mean(Kind::Float)? } else { y })
    }
}

/// A layer goes backward, or makes up for the gradient of a matrix that has waited: the engine says so.
const BACKWARD: Event = ('B', 0, 0);

/// What the layers of a stage note down if it does what `actions` say. The loss of a schedule that keeps many waiting is made anew
/// for its backward pass (`makes_loss_anew`).
fn events(actions: &[Action], stage: usize, makes_loss_anew: bool) -> Vec<Event> {
    let of = |&action: &Action| -> Vec<Event> {
        let Some(piece) = action.piece() else { return vec![] };
        let event = |letter: char| (letter, piece.microbatch, piece.chunk);
        // Nobody wants the gradient of the batch.
        let has_input_grad = stage > 0 || piece.chunk > 0;
        let input = has_input_grad.then(|| event('I'));
        match action {
            Action::Forward(_) => vec![event('F')],
            Action::Backward(_) | Action::BackwardInput(_) => {
                let again = makes_loss_anew.then(|| event('F'));
                again.into_iter().chain([BACKWARD]).chain(input).chain([event('W')]).collect()
            }
            Action::BackwardWeight(_) => vec![BACKWARD],
            _ => vec![],
        }
    };
    actions.iter().flat_map(of).collect()
}

/// The two gradients of one graph come in libtorch's order: the input's is put first.
fn in_order(mut events: Vec<Event>) -> Vec<Event> {
    for i in 1..events.len() {
        let [(before, ..), (after, ..)] = [events[i - 1], events[i]];
        let is_pair = events[i - 1].1 == events[i].1 && events[i - 1].2 == events[i].2;
        if (before, after) == ('W', 'I') && is_pair {
            events.swap(i - 1, i);
        }
    }
    events
}

/// The schedule is data, and this is what is done: in this order, with no more graphs alive than the plan says.
#[test]
fn stages_do_what_their_schedules_say_and_keep_no_more() {
    for (num_stages, num_microbatches) in [(1, 3), (2, 1), (2, 5), (3, 3), (3, 7), (4, 8)] {
        for schedule in [
            ScheduleKind::GPipe,
            ScheduleKind::OneForwardOneBackward,
            ScheduleKind::Interleaved { num_chunks: 2 },
            ScheduleKind::Interleaved { num_chunks: 3 },
            ScheduleKind::ZeroBubble,
        ] {
            let Ok(plan) = Schedule::new(schedule, num_stages, num_microbatches) else {
                assert!(num_microbatches < num_stages && schedule.num_chunks() > 1);
                continue;
            };
            for stage in [ZeroStage::One, ZeroStage::Three] {
                let what = format!(
                    "{schedule}, {num_stages} stages, {num_microbatches} micro-batches, ZeRO {stage}"
                );
                let all = on_mesh([num_stages, 1, 1], |ranks| {
                    set_num_threads(1);
                    let notes = Notes::default();
                    let layer = |part| Noting {
                        name: format!("part.{part}"),
                        chunk: part / num_stages,
                        is_last: part + 1 == plan.num_parts(),
                        notes: notes.clone(),
                    };
                    let layers = (0..plan.num_parts()).map(|part| Box::new(layer(part)) as Box<dyn Layer>);
                    let options = plain_sgd(stage, num_microbatches, schedule);
                    let mut engine =
                        Engine::new(layers.collect(), options, ranks, &mut RandomInit { seed: 3 }).unwrap();
                    let noted = notes.events.clone();
                    engine.observe(move |phase| {
                        if phase == Phase::Backward {
                            noted.lock().unwrap().push(BACKWARD);
                        }
                    });
                    let batch = |microbatch| {
                        let input = Tensor::from_slice(&[1.0f32, 2.0]).view([1, 2]);
                        Ok(Batch { target: input.shallow_clone(), input, first_row: microbatch as u64 })
                    };
                    engine.train_step(0.1, batch).unwrap();
                    assert_eq!(notes.num_alive.load(Ordering::Relaxed), 0, "{what}");
                    notes
                });
                for (stage, notes) in all.iter().enumerate() {
                    let found = in_order(notes.events.lock().unwrap().clone());
                    let later = loss_turn(Some(schedule), num_microbatches) == LossTurn::Later;
                    let makes_loss_anew = later && stage + 1 == num_stages;
                    let expected = events(plan.actions(stage), stage, makes_loss_anew);
                    assert_eq!(found, expected, "stage {stage}: {what}");
                    let most_alive = notes.most_alive.load(Ordering::Relaxed);
                    // Here the loss is all of the last stage.
                    let planned = if makes_loss_anew { 1 } else { plan.peak_activations(stage) };
                    match schedule {
                        // Of a matrix that waits only its two factors stay, which are not counted here.
                        ScheduleKind::ZeroBubble => {
                            assert!(most_alive <= planned, "{most_alive} on stage {stage}: {what}");
                        }
                        _ => assert_eq!(most_alive, planned, "stage {stage}: {what}"),
                    }
                    if schedule == ScheduleKind::OneForwardOneBackward {
                        assert!(most_alive <= num_stages - stage, "{most_alive} on stage {stage}: {what}");
                    }
                }
            }
        }
    }
}
