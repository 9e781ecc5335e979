//! A loaded model predicts what the transformers package predicts with the same files.

use shardwise_comm::{solo, thread};
use shardwise_device::DType;
use shardwise_models::{HfSource, ModelError, read_config};
use shardwise_plan::ZeroStage;
use shardwise_plan::zoo::ModelConfig;

use crate::fixture::{Golden, MODELS, folder, frozen, largest_difference, load, numbers, options};

/// Both sides compute in fp32 but add in other orders: at scores of about 4, whose unit in the last place is 5e-7, a few dozen
/// such steps stay well below; a wrong epsilon, angle or activation does not.
const LOGIT_TOLERANCE: f32 = 1e-4;
/// A mean over 78 positions of differences like those above; they cancel rather than add.
const LOSS_TOLERANCE: f64 = 1e-5;

#[test]
fn logits_and_loss_are_those_of_transformers() {
    for model in MODELS {
        let golden = Golden::read(model);
        let mut engine = load(&folder(model), frozen(), solo());
        let logits = engine.predict(&golden.ids).unwrap();
        assert_eq!(logits.size(), [2, 40, 67]);
        let gap = largest_difference(&numbers(&logits), &golden.logits);
        let (input, target) = golden.next_token();
        let loss = engine.evaluate(&input, &target).unwrap();
        println!("{model}: logits differ by {gap:.1e}, losses by {:.1e}", (loss - golden.loss).abs());
        assert!(gap < LOGIT_TOLERANCE, "{model}: {gap}");
        assert!((loss - golden.loss).abs() < LOSS_TOLERANCE, "{model}: {loss}, expected {}", golden.loss);
    }
}

#[test]
fn sharded_parameters_give_the_same_logits_bit_for_bit() {
    for model in MODELS {
        let golden = Golden::read(model);
        let mut whole = load(&folder(model), frozen(), solo());
        let expected = numbers(&whole.predict(&golden.ids).unwrap());
        for world_size in [2, 3] {
            let of_ranks = thread::run(world_size, |group| {
                let mut engine = load(&folder(model), options(ZeroStage::Three, DType::F32), group);
                numbers(&engine.predict(&Golden::read(model).ids).unwrap())
            });
            for (rank, logits) in of_ranks.iter().enumerate() {
                assert!(*logits == expected, "{model}, rank {rank} of {world_size}");
            }
        }
    }
}

#[test]
fn every_parameter_of_the_files_is_used() {
    // The other direction is an error of `HfSource::open`; a file with more than we read would be another model.
    for model in MODELS {
        let (config, _) = read_config(&folder(model)).unwrap();
        let mut names: Vec<String> =
            config.layers().into_iter().flat_map(|layer| layer.params).map(|param| param.name).collect();
        names.sort();
        names.dedup();
        let path = folder(model);
        let reader = shardwise_checkpoint::HfReader::open(&path).unwrap();
        let mut in_file: Vec<String> = reader.tensors().iter().map(|tensor| tensor.name.clone()).collect();
        if model == "gpt2-bare" {
            in_file.iter_mut().for_each(|name| name.insert_str(0, "transformer."));
        }
        in_file.sort();
        assert_eq!(names, in_file, "{model}");
    }
}

#[test]
fn weights_of_another_model_are_refused_by_name() {
    let open = |change: fn(&mut serde_json::Value)| {
        let (_, mut json) = read_config(&folder("llama-tied")).unwrap();
        change(&mut json);
        let config = ModelConfig::from_json(&json).unwrap();
        let error: ModelError = HfSource::open(&folder("llama-tied"), &config.layers()).unwrap_err();
        error.to_string()
    };
    let more_layers = open(|json| json["num_hidden_layers"] = 3.into());
    assert!(more_layers.contains("`model.layers.2.input_layernorm.weight`"), "{more_layers}");
    let untied = open(|json| json["tie_word_embeddings"] = false.into());
    assert!(untied.contains("`lm_head.weight`"), "{untied}");
    let wider = open(|json| json["intermediate_size"] = 45.into());
    assert!(wider.contains("`model.layers.0.mlp.gate_proj.weight`") && wider.contains("[45, 32]"), "{wider}");
}
