//! What one layout costs: memory of the fullest stage, traffic of the busiest rank, time of a step.

use super::{Cluster, Estimate, Job, Layout, RankMemory};
use crate::memory::{LayerActivations, MemoryPlan};
use crate::pipeline::{ScheduleKind, Stages};
use crate::share::{Pass, Share, Step};
use crate::traffic::AxisTraffic;
use crate::{ActivationPolicy, Axis, Bytes, Overlap};

/// All that the estimates of one mesh have in common.
pub(super) struct Costs<'a> {
    pub job: &'a Job,
    pub cluster: &'a Cluster,
    pub stages: &'a Stages,
    /// What the ranks of each stage hold.
    pub shares: &'a [Share],
    /// Forward operations of each layer for a token, on all tensor-parallel ranks together.
    pub flops: &'a [u64],
}

/// Time of a micro-batch on one stage.
#[derive(Clone, Copy)]
struct StageTime {
    forward: f64,
    backward_input: f64,
    backward_weight: f64,
}

impl StageTime {
    fn total(self) -> f64 {
        self.forward + self.backward_input + self.backward_weight
    }
}

impl RankMemory {
    /// The kinds of a plan, without what is not for it to give.
    fn new(plan: &MemoryPlan, reserved: Bytes) -> Self {
        RankMemory {
            parameters: plan.state.params,
            gradients: plan.state.grads,
            optimizer: plan.state.master_params + plan.state.optimizer,
            activations: plan.activations,
            buffers: plan.gathered
                + plan.reductions
                + plan.transfers
                + plan.messages
                + plan.layer_grads
                + plan.temporaries
                + reserved,
        }
    }
}

impl Costs<'_> {
    /// Estimates a layout whose micro-batches hold `activations` in each layer, of which `policies` says what becomes.
    pub fn estimate(
        &self,
        layout: &Layout,
        activations: &[LayerActivations],
        policies: &[ActivationPolicy],
    ) -> Estimate {
        let step = Step {
            mesh: layout.mesh,
            stages: self.stages,
            schedule: layout.schedule,
            zero: layout.stage,
            sequence: self.job.sequence,
            hidden_size: self.job.model.hidden_size(),
            activations,
            policies,
            compute_bytes: self.job.compute_bytes,
            widths: self.job.widths,
            microbatch_tokens: layout.micro_batch * self.job.seq_len,
            num_microbatches: layout.num_microbatches,
            overlap: self.job.overlap,
            device: self.job.device,
        };
        let mut fullest = (0, RankMemory::default());
        let mut traffic = AxisTraffic::default();
        let mut times = Vec::with_capacity(self.shares.len());
        for share in self.shares {
            let memory = RankMemory::new(&step.memory(share, layout.stage), self.cluster.reserved);
            if share.stage == 0 || memory.total() > fullest.1.total() {
                fullest = (share.stage, memory);
            }
            traffic = traffic.max(step.traffic(share));
            times.push(self.time(&step, share));
        }
        let (bubble, step_s) = self.step(layout, &step, &times, &traffic);
        let (fullest_stage, memory) = fullest;
        let excess = Bytes(memory.total().0.saturating_sub(self.cluster.device_memory.0));
        Estimate { layout: *layout, memory, fullest_stage, excess, traffic, bubble, step_s }
    }

    fn time(&self, step: &Step<'_>, share: &Share) -> StageTime {
        let degree = step.mesh.degree(Axis::Tensor);
        let layers = &share.layers;
        let seconds = |of: &dyn Fn(usize) -> bool| {
            let flops: u64 = layers.iter().filter(|&&layer| of(layer)).map(|&layer| self.flops[layer]).sum();
            flops as f64 * step.microbatch_tokens as f64 / degree as f64 / self.cluster.flops
        };
        let one = seconds(&|_| true);
        let again = seconds(&|layer| step.policies[layer].recomputes());
        let rate = self.rate(degree);
        let tensor = |pass: Pass| -> f64 {
            layers.iter().map(|&layer| step.tensor_bytes(layer, pass).0 as f64 / rate).sum()
        };
        StageTime {
            forward: one + tensor(Pass::Forward),
            backward_input: one + again + tensor(Pass::Backward),
            backward_weight: one,
        }
    }

    /// Bytes a second within groups that span this many neighbouring ranks.
    fn rate(&self, span: usize) -> f64 {
        if span <= self.cluster.ranks_per_host { self.cluster.host_link } else { self.cluster.link }
    }

    /// The bubble, and the time of a step.
    fn step(
        &self,
        layout: &Layout,
        step: &Step<'_>,
        times: &[StageTime],
        traffic: &AxisTraffic,
    ) -> (f64, f64) {
        let num_microbatches = layout.num_microbatches as f64;
        let slowest = times.iter().copied().max_by(|a, b| a.total().total_cmp(&b.total()));
        let slowest = slowest.expect("a pipeline has stages");
        let all: f64 = times.iter().map(|time| time.total()).sum();
        // What passes before the slowest stage is busy and after it.
        let filling = match layout.schedule {
            None => 0.0,
            Some(ScheduleKind::ZeroBubble) => {
                let StageTime { forward, backward_input, backward_weight } = slowest;
                let unfilled = (forward + backward_input - backward_weight) / slowest.total();
                (all - slowest.total()) * unfilled
            }
            Some(schedule) => (all - slowest.total()) / schedule.num_chunks() as f64,
        };
        let busy = num_microbatches * slowest.total();
        let pipeline = busy + filling;
        let bubble =
            if pipeline > 0.0 { 1.0 - num_microbatches * all / (times.len() as f64 * pipeline) } else { 0.0 };
        let [p, d, t] = [Axis::Pipeline, Axis::Data, Axis::Tensor].map(|axis| layout.mesh.degree(axis));
        let data = traffic.data.0 as f64 / self.rate(d * t);
        let beside = match self.job.overlap {
            Overlap::Inline => 0.0,
            Overlap::SideThread if layout.stage.shards_gradients() => busy,
            Overlap::SideThread => slowest.backward_input + slowest.backward_weight,
        };
        let message = step.boundary().0 as f64 / self.rate(p * d * t);
        let messages = 2.0 * (p - 1) as f64 * message;
        (bubble.max(0.0), pipeline + messages + (data - beside).max(0.0))
    }
}
