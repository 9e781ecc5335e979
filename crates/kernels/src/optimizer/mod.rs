//! Optimizers in one pass over the state.
//!
//! A step reads the gradient and the fp32 state once and writes the state and the 16-bit copy of the parameters once.
//! Unscaling, averaging and clipping ride along as one factor on the gradient. At that traffic the memory is the
//! limit, so nothing here is cleverer than it must be.
//!
//! ```text
//! Adam, Sgd, Adagrad, Lion    one pass: each element for itself            adam.rs, sgd.rs, adagrad.rs, lion.rs
//! Lamb                        moments and norms | exchange | parameters    lamb.rs
//! Muon                        momentum | gather | orthogonalize | apply    muon.rs
//! ```
//!
//! Between the bars stands what needs the other ranks: kernels know none, their caller exchanges. Element-wise
//! rules are written once (`Rule`) and run by one loop (`pass.rs`). Scalars of a step are computed in `f64` and
//! rounded once. Every instruction set and every number of threads gives the same bits, but for the matrix products
//! of Muon, which depend on the instruction set.
//!
//! States are fp32, or bf16 rounded at random ([`Noise`]): rounded to nearest, a mean that decays slowly would stop
//! moving as soon as a step is smaller than half a unit in the last place.

pub(crate) mod adagrad;
pub(crate) mod adam;
pub(crate) mod lamb;
pub(crate) mod lion;
mod muon;
mod pass;
pub(crate) mod sgd;
mod stochastic;

pub use adagrad::Adagrad;
pub use adam::{Adam, BiasCorrection, WeightDecay};
pub use lamb::{Lamb, SquaredNorms};
pub use lion::Lion;
pub use muon::{Muon, orthogonalize_on};
pub use sgd::{Direction, Sgd};
pub use stochastic::Noise;

use half::{bf16, f16};

use crate::Threads;
use crate::cast::Cast;
use crate::isa::Isa;
use crate::parallel::{Split, for_each_piece};
use crate::simd::Simd;
use pass::{Pass, Streamed};
use stochastic::StochasticPass;

/// Where the 16-bit copy of the new parameters goes.
#[derive(Debug)]
pub enum ComputeCopy<'a> {
    /// The model computes in fp32: no copy.
    None,
    /// Rounded to bf16.
    Bf16(&'a mut [bf16]),
    /// Rounded to f16; what is too large becomes infinite.
    F16(&'a mut [f16]),
}

/// An optimizer's `K` states of each element.
#[derive(Debug)]
pub enum States<'a, const K: usize> {
    /// As they are computed.
    F32([&'a mut [f32]; K]),
    /// Rounded at random to one of the two neighbours, the nearer the likelier.
    Bf16([&'a mut [bf16]; K], Noise),
}

/// The gradient. In 16 bits it is widened on the way, which is exact.
#[derive(Debug, Clone, Copy)]
pub enum Gradient<'a> {
    /// As it is computed with.
    F32(&'a [f32]),
    /// In bf16.
    Bf16(&'a [bf16]),
    /// In f16.
    F16(&'a [f16]),
}

impl<'a> From<&'a [f32]> for Gradient<'a> {
    fn from(grad: &'a [f32]) -> Self {
        Gradient::F32(grad)
    }
}

/// The slices of one step, all of the same length.
#[derive(Debug)]
pub struct Tensors<'a, const K: usize> {
    /// Gradient, read.
    pub grad: Gradient<'a>,
    /// Parameters, updated.
    pub master: &'a mut [f32],
    /// The optimizer's states, updated.
    pub states: States<'a, K>,
    /// 16-bit copy of the parameters, written.
    pub compute: ComputeCopy<'a>,
}

/// What an optimizer does with one element, in as many lanes as there are.
///
/// The factors are fields, the same for all elements; the loop keeps them in registers.
trait Rule<const K: usize>: Copy + Send + Sync {
    /// The parameters and states after a step.
    fn update<S: Simd>(
        self,
        simd: S,
        grad: S::Vector,
        param: S::Vector,
        states: [S::Vector; K],
    ) -> (S::Vector, [S::Vector; K]);
}

/// How the 16-bit copy is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Store {
    /// Into the cache.
    Cached,
    /// Past the cache.
    Streamed,
}

impl Store {
    /// Steps of at least this many elements move 18 MB and more: their copy would not stay in the cache.
    const STREAM_NUMEL: usize = 1 << 20;

    fn of_step(numel: usize) -> Self {
        if numel < Self::STREAM_NUMEL { Store::Cached } else { Store::Streamed }
    }
}

/// Applies `rule` to every element, on several threads.
fn apply_on<const K: usize>(threads: Threads, rule: impl Rule<K>, tensors: Tensors<'_, K>) {
    let store = Store::of_step(tensors.grad.numel());
    apply_with(Isa::best(), threads, store, rule, tensors);
}

fn apply_with<const K: usize>(
    isa: Isa,
    threads: Threads,
    store: Store,
    rule: impl Rule<K>,
    tensors: Tensors<'_, K>,
) {
    tensors.check();
    for_each_piece(threads, tensors, |piece| {
        for_each_widened(isa, piece, |grad, piece| pass_over(isa, store, rule, grad, piece));
    });
}

/// Elements of a gradient that are widened at a time: they stay in the first cache.
const WIDENED_NUMEL: usize = 2048;

/// Calls `run` with the gradient of `piece` in fp32, and with the piece that it is of.
fn for_each_widened<'a, const K: usize>(
    isa: Isa,
    piece: Tensors<'a, K>,
    mut run: impl FnMut(&[f32], Tensors<'a, K>),
) {
    if let Gradient::F32(grad) = piece.grad {
        return run(grad, piece);
    }
    let mut wide = [0f32; WIDENED_NUMEL];
    let mut rest = Some(piece);
    while let Some(piece) = rest.take() {
        let count = piece.numel().min(WIDENED_NUMEL);
        let (piece, others) = piece.split_at(count);
        rest = Some(others).filter(|others| others.numel() > 0);
        let wide = &mut wide[..count];
        match piece.grad {
            Gradient::F32(_) => unreachable!("returned above"),
            Gradient::Bf16(grad) => isa.run(Cast { from: grad, to: wide }),
            Gradient::F16(grad) => isa.run(Cast { from: grad, to: wide }),
        }
        run(wide, piece);
    }
}

fn pass_over<const K: usize>(
    isa: Isa,
    store: Store,
    rule: impl Rule<K>,
    grad: &[f32],
    Tensors { master, states, compute, .. }: Tensors<'_, K>,
) {
    match states {
        States::F32(states) => {
            let pass = Pass { rule, grad, master, states, compute: () };
            match (compute, store) {
                (ComputeCopy::None, _) => isa.run(pass),
                (ComputeCopy::Bf16(copy), Store::Cached) => isa.run(pass.writing(copy)),
                (ComputeCopy::Bf16(copy), Store::Streamed) => isa.run(pass.writing(Streamed(copy))),
                (ComputeCopy::F16(copy), Store::Cached) => isa.run(pass.writing(copy)),
                (ComputeCopy::F16(copy), Store::Streamed) => isa.run(pass.writing(Streamed(copy))),
            }
        }
        States::Bf16(states, noise) => {
            let pass = StochasticPass { rule, noise, grad, master, states, compute: () };
            match compute {
                ComputeCopy::None => isa.run(pass),
                ComputeCopy::Bf16(copy) => isa.run(pass.writing(copy)),
                ComputeCopy::F16(copy) => isa.run(pass.writing(copy)),
            }
        }
    }
}

impl Gradient<'_> {
    fn numel(&self) -> usize {
        match self {
            Gradient::F32(grad) => grad.len(),
            Gradient::Bf16(grad) => grad.len(),
            Gradient::F16(grad) => grad.len(),
        }
    }

    fn split_at(self, at: usize) -> (Self, Self) {
        match self {
            Gradient::F32(grad) => both(grad.split_at(at), Gradient::F32),
            Gradient::Bf16(grad) => both(grad.split_at(at), Gradient::Bf16),
            Gradient::F16(grad) => both(grad.split_at(at), Gradient::F16),
        }
    }
}

fn both<A, B>((low, high): (A, A), make: impl Fn(A) -> B) -> (B, B) {
    (make(low), make(high))
}

impl ComputeCopy<'_> {
    fn numel(&self) -> Option<usize> {
        match self {
            ComputeCopy::None => None,
            ComputeCopy::Bf16(copy) => Some(copy.len()),
            ComputeCopy::F16(copy) => Some(copy.len()),
        }
    }

    fn split_at(self, at: usize) -> (Self, Self) {
        match self {
            ComputeCopy::None => (ComputeCopy::None, ComputeCopy::None),
            ComputeCopy::Bf16(copy) => both(copy.split_at_mut(at), ComputeCopy::Bf16),
            ComputeCopy::F16(copy) => both(copy.split_at_mut(at), ComputeCopy::F16),
        }
    }
}

impl<const K: usize> Tensors<'_, K> {
    fn check(&self) {
        let numel = self.grad.numel();
        assert_eq!(self.master.len(), numel, "master parameters against gradients");
        assert_eq!(self.compute.numel().unwrap_or(numel), numel, "compute copy against gradients");
        let same = match &self.states {
            States::F32(states) => states.iter().all(|state| state.len() == numel),
            States::Bf16(states, _) => states.iter().all(|state| state.len() == numel),
        };
        assert!(same, "optimizer states against gradients");
    }
}

impl<const K: usize> Split for Tensors<'_, K> {
    fn numel(&self) -> usize {
        self.grad.numel()
    }

    fn split_at(self, at: usize) -> (Self, Self) {
        let grad = self.grad.split_at(at);
        let master = self.master.split_at_mut(at);
        let compute = self.compute.split_at(at);
        let states = match self.states {
            States::F32(states) => {
                let (low, high) = split_each(states, at);
                (States::F32(low), States::F32(high))
            }
            States::Bf16(states, noise) => {
                let (low, high) = split_each(states, at);
                (States::Bf16(low, noise), States::Bf16(high, noise.after(at)))
            }
        };
        (
            Tensors { grad: grad.0, master: master.0, states: states.0, compute: compute.0 },
            Tensors { grad: grad.1, master: master.1, states: states.1, compute: compute.1 },
        )
    }
}

/// [`slice::split_at_mut`] on each.
fn split_each<T, const K: usize>(all: [&mut [T]; K], at: usize) -> ([&mut [T]; K], [&mut [T]; K]) {
    let mut high: [&mut [T]; K] = std::array::from_fn(|_| Default::default());
    let mut high_slots = high.iter_mut();
    let low = all.map(|slice| {
        let (low, rest) = slice.split_at_mut(at);
        *high_slots.next().expect("as many as there are slices") = rest;
        low
    });
    (low, high)
}

/// `base^exponent` by squaring: unlike the library's `powi` and `powf`, the same bits on every machine.
fn power(mut base: f64, mut exponent: u64) -> f64 {
    let mut product = 1.0;
    while exponent > 0 {
        if exponent & 1 == 1 {
            product *= base;
        }
        base *= base;
        exponent >>= 1;
    }
    product
}

#[cfg(test)]
mod tests;
