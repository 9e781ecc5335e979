//! What is refused before anything trains.

use shardwise_comm::solo;
use shardwise_device::DType;
use shardwise_engine::{Context, Engine, EngineError, Layer, Params};
use shardwise_plan::{ActivationPolicy, Init, LayerSpec, NamePattern, ParamSpec, ZeroStage};
use shardwise_torch::{Kind, Tensor};

use crate::layers::{Gradients, model};
use crate::runs::{Run, batch, chain, engine, no_decay, options};

fn refused(layers: Vec<Box<dyn Layer>>, change: impl FnOnce(&mut shardwise_engine::EngineOptions)) -> String {
    let mut options = options(ZeroStage::One, DType::F32);
    change(&mut options);
    chain(&engine(layers, options, solo()).err().expect("a refusal"))
}

#[test]
fn patterns_must_match_something() {
    assert_eq!(
        refused(model(Gradients::Always), |options| options.frozen =
            vec!["*.bias".into(), "nobody.*".into()]),
        "pattern `nobody.*` of `frozen` matches no parameter"
    );
    assert_eq!(
        refused(model(Gradients::Always), |options| options.zero.groups = vec![no_decay(&["bias".into()])]),
        "pattern `bias` of `groups` matches no parameter"
    );
}

#[test]
fn rules_for_activations_must_name_a_layer() {
    let error = refused(model(Gradients::Always), |options| {
        options.activations.rules = vec![(NamePattern::new("blocks.*"), ActivationPolicy::Recompute)];
    });
    let expected =
        "pattern `blocks.*` of `activations` matches no layer, the layers are [\"embedding\", \"up\"";
    assert!(error.starts_with(expected), "{error}");
}

#[test]
fn a_model_needs_layers() {
    assert_eq!(refused(vec![], |_| {}), "a model needs at least one layer");
}

#[test]
fn options_of_the_state_are_checked() {
    let error = refused(model(Gradients::Always), |options| options.zero.grad_accum_steps = 0);
    assert_eq!(error, "`grad_accum_steps` is `0`, expected at least `1`");
}

/// Declares `shape` for the parameter `shared`, and asks for `asked`.
struct Asks {
    shape: [usize; 2],
    asked: &'static str,
}

impl Layer for Asks {
    fn spec(&self) -> LayerSpec {
        let shared = ParamSpec::new("", "shared", &self.shape, Init::Ones);
        LayerSpec { name: format!("asks.{}", self.asked), params: vec![shared] }
    }

    fn forward(&self, _: &Context<'_>, params: &Params<'_>, x: &Tensor) -> Result<Tensor, EngineError> {
        Ok(x.f_to_kind(Kind::Float)?.f_sum(Kind::Float)?.f_mul(params.get(self.asked)?)?)
    }
}

#[test]
fn tied_parameters_must_agree_in_shape() {
    let layers: Vec<Box<dyn Layer>> = vec![
        Box::new(Asks { shape: [2, 3], asked: "shared" }),
        Box::new(Asks { shape: [3, 2], asked: "shared" }),
    ];
    let expected = "tied parameter `shared` has shape `[2, 3]` in one layer and `[3, 2]` in another";
    assert_eq!(refused(layers, |_| {}), expected);
}

fn built(layer: Asks) -> Engine {
    engine(vec![Box::new(layer)], options(ZeroStage::Three, DType::F32), solo()).unwrap()
}

#[test]
fn a_parameter_that_was_not_declared_is_named_with_its_layer() {
    let expected = "layer `asks.wieght`, forward: no parameter `wieght`, the layer declares [\"shared\"]";
    let mut engine = built(Asks { shape: [1, 1], asked: "wieght" });
    let error = engine.predict(&batch(0, 1).input).unwrap_err();
    assert_eq!(chain(&error), expected);
    let mut engine = built(Asks { shape: [1, 1], asked: "wieght" });
    let error = engine.train_step(0.1, |_| Ok(batch(0, 1))).unwrap_err();
    assert_eq!(chain(&error), expected);
}

#[test]
fn the_last_layer_must_give_a_loss() {
    let mut engine = built(Asks { shape: [2, 3], asked: "shared" });
    let error = engine.train_step(0.1, |_| Ok(batch(0, 1))).unwrap_err();
    assert_eq!(error.to_string(), "the last layer's output has shape `[2, 3]`, expected a scalar loss");
}

#[test]
fn parameters_given_directly_are_found_by_key() {
    let entries =
        [("a".to_owned(), Tensor::from_slice(&[1f32])), ("b".to_owned(), Tensor::from_slice(&[2f32]))];
    let params = Params::new(&entries);
    assert_eq!(params.get("b").unwrap().double_value(&[0]), 2.0);
    assert!(params.find("c").is_none());
    assert_eq!(
        params.get("c").unwrap_err().to_string(),
        "no parameter `c`, the layer declares [\"a\", \"b\"]"
    );
}

/// A batch that a layer cannot take is told by libtorch, with the layer's name.
#[test]
fn libtorchs_own_words_come_with_the_layer() {
    let mut engine = Run::new(1, ZeroStage::Zero, DType::F32).engine(solo());
    let floats = Tensor::zeros([2, 3], (Kind::Float, shardwise_torch::Device::Cpu));
    let error = chain(&engine.predict(&floats).unwrap_err());
    assert!(error.starts_with("layer `embedding`, forward: ") && error.len() > 40, "{error}");
}
