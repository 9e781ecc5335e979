//! Meshes as processes: pipeline stages, data-parallel and tensor-parallel ranks train what one rank does.

use crate::case::Curve;
use crate::layout::{Layout, Model, gap};
use crate::ranks::Ended;

const STEPS: usize = 5;

/// The same sums in other orders: of the samples, of the parts that ranks have of a matrix product, of the norm. Of a loss of about 7,
/// and of a norm as a part of it (4e-7 was measured).
const MESH_TOLERANCE: f64 = 3e-6;
/// Of a weight (1.4e-7 was measured; a step moves one by up to 3e-4).
const WEIGHT_TOLERANCE: f32 = 1e-6;

struct Alone {
    curve: Curve,
    ended: Ended,
}

impl Alone {
    fn train(model: Model) -> Self {
        let ended = Layout { model, ..Layout::ALONE }.ranks(STEPS).run();
        assert!(ended.metrics().iter().all(|step| step.comm_bytes == 0));
        Alone { curve: ended.curve(), ended }
    }

    /// Trains like that on a mesh.
    fn compare(&self, layout: Layout) {
        let ended = layout.ranks(STEPS).run();
        let (losses, norms) = ended.curve().gaps(&self.curve);
        let weights = gap(&ended.weights(), &self.ended.weights());
        println!("{layout:?}: losses differ by {losses:.1e}, norms by {norms:.1e}, weights by {weights:.1e}");
        assert!(losses < MESH_TOLERANCE && norms < MESH_TOLERANCE, "{layout:?}: {losses} {norms}");
        assert!(weights < WEIGHT_TOLERANCE, "{layout:?}: {weights}");
        for step in ended.metrics() {
            assert!(step.comm_bytes > 0 && step.tokens == 8 * 64, "{layout:?}: {step:?}");
        }
    }
}

#[test]
fn a_llama_trains_alike_on_every_mesh() {
    let alone = Alone::train(Model::Llama);
    for layout in [
        Layout::new([1, 1, 2], 0),
        Layout { sequence: true, ..Layout::new([1, 1, 2], 1) },
        // More ranks than key and value heads.
        Layout::new([1, 1, 4], 0),
        Layout { schedule: "gpipe", ..Layout::new([2, 1, 1], 0) },
        Layout { schedule: "zero-bubble", ..Layout::new([2, 1, 1], 3) },
        Layout { schedule: "interleaved:2", ..Layout::new([2, 1, 1], 1) },
        Layout::new([2, 2, 1], 3),
        Layout::new([1, 2, 2], 1),
        Layout { sequence: true, ..Layout::new([1, 2, 2], 3) },
        Layout { sequence: true, schedule: "zero-bubble", ..Layout::new([2, 1, 2], 1) },
        Layout::new([2, 2, 2], 3),
    ] {
        alone.compare(layout);
    }
}

#[test]
fn a_gpt2_with_one_table_trains_alike_on_every_mesh() {
    let alone = Alone::train(Model::Gpt2);
    for layout in [
        Layout::new([1, 1, 2], 1),
        Layout::new([2, 1, 1], 3),
        Layout::new([2, 2, 1], 1),
        Layout { sequence: true, schedule: "interleaved:2", ..Layout::new([2, 1, 2], 3) },
    ] {
        alone.compare(Layout { model: Model::Gpt2, ..layout });
    }
}
