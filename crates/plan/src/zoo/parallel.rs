//! What a model costs where its layers are spread: operations of each layer, and activations on a tensor-parallel rank.

use serde::Serialize;

use super::ModelConfig;
use crate::memory::{HeadChunks, HeadShape, LayerActivations};
use crate::tensor::SplitError;

/// What tensor-parallel ranks keep between linear layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SequenceParallel {
    /// Every rank has all tokens.
    Off,
    /// Each rank has its share of the tokens: norms and residuals are split too.
    ///
    /// # Source
    /// Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv:2205.05198) section 4.2.2.
    On,
}

/// What attention holds of keys and values that a group of queries shares.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupedQueries {
    /// Each once.
    #[default]
    Shared,
    /// Copies for every query head.
    Repeated,
}

/// A micro-batch, and how layers hold it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Microbatch {
    /// Samples.
    pub num_samples: usize,
    /// Tokens of a sample.
    pub seq_len: usize,
    /// Bytes of an element of activations.
    pub compute_bytes: usize,
    /// Rows whose scores a head holds at a time.
    pub head_chunks: HeadChunks,
    /// What attention holds of shared keys and values.
    pub grouped_queries: GroupedQueries,
}

/// The widths that a block's cost follows from.
struct Block {
    hidden: usize,
    /// Of all query heads.
    query: usize,
    /// Of all key heads, and of all value heads.
    key_value: usize,
    num_kv_heads: usize,
    intermediate: usize,
    /// Matrices as wide as the MLP: with a gate three, without two.
    num_mlp_matrices: usize,
    num_heads: usize,
    /// Whether attention drops probabilities, and so has to hold them.
    drops_attention: bool,
}

impl ModelConfig {
    fn block(&self) -> Block {
        match self {
            ModelConfig::Llama(config) => Block {
                hidden: config.hidden_size,
                query: config.num_attention_heads * config.head_dim,
                key_value: config.num_key_value_heads * config.head_dim,
                num_kv_heads: config.num_key_value_heads,
                intermediate: config.intermediate_size,
                num_mlp_matrices: 3,
                num_heads: config.num_attention_heads,
                drops_attention: config.attention_dropout > 0.0,
            },
            ModelConfig::Gpt2(config) => Block {
                hidden: config.n_embd,
                query: config.n_embd,
                key_value: config.n_embd,
                num_kv_heads: config.n_head,
                intermediate: config.n_inner,
                num_mlp_matrices: 2,
                num_heads: config.n_head,
                drops_attention: config.attn_pdrop > 0.0,
            },
        }
    }

    /// Blocks between the embedding and the head.
    pub fn num_blocks(&self) -> usize {
        match self {
            ModelConfig::Llama(config) => config.num_hidden_layers,
            ModelConfig::Gpt2(config) => config.n_layer,
        }
    }

    /// Floating-point operations of each of [`ModelConfig::layers`] for one token's forward pass, in samples of `seq_len` tokens: two for
    /// each element of a matrix, and attention over the tokens before. The backward pass takes twice as many.
    pub fn forward_flops(&self, seq_len: usize) -> Vec<u64> {
        let Block { hidden: d, query: q, key_value: kv, intermediate: f, num_mlp_matrices, .. } =
            self.block();
        let matrices = 2 * d * q + 2 * d * kv + num_mlp_matrices * d * f;
        // Scores and weighted values, each over half of the sample on average.
        let attention = 2 * q * seq_len;
        let block = (2 * matrices + attention) as u64;
        let head = (2 * d * self.vocab_size()) as u64;
        let blocks = std::iter::repeat_n(block, self.num_blocks());
        // An embedding looks up.
        std::iter::once(0).chain(blocks).chain([head]).collect()
    }

    /// What each of [`ModelConfig::layers`] holds on one of `degree` tensor-parallel ranks while a micro-batch goes through it.
    pub fn activations(
        &self,
        degree: usize,
        sequence: SequenceParallel,
        microbatch: Microbatch,
    ) -> Vec<LayerActivations> {
        let Microbatch { num_samples, seq_len, compute_bytes, head_chunks, grouped_queries } = microbatch;
        let widths = self.block();
        let d = widths.hidden;
        let share = |width: usize| width.div_ceil(degree);
        let q = share(widths.query);
        let kv = widths.key_value / widths.num_kv_heads * widths.num_kv_heads.div_ceil(degree);
        let f = share(widths.intermediate);
        let mlp = widths.num_mlp_matrices * f;
        let probabilities = if widths.drops_attention { share(widths.num_heads) * seq_len } else { 0 };
        let between = match sequence {
            SequenceParallel::Off => d,
            SequenceParallel::On => share(d),
        };
        // Dropped attention of grouped queries holds keys and values for every head.
        let repeats = widths.drops_attention || grouped_queries == GroupedQueries::Repeated;
        let repeated = if repeats && kv < q { 2 * q } else { 0 };
        // Two normalised inputs, which split tokens are gathered into, and the residual between; q, k, v (after rotation) and the
        // attention's output; the MLP's own: gate, up and their product, or what is before and after the activation. Attention that
        // drops probabilities holds them, before and after.
        let kept = 2 * d + between + 2 * q + 2 * kv + mlp + repeated + 2 * probabilities;
        // Backward: gradients within the MLP, of which one is gone by the end; when that is done and what it held is gone, those of q,
        // k, v and the attention's output with what the kernel sums in, and one more matrix of probabilities.
        let (within_mlp, gone) = match self {
            ModelConfig::Llama(_) => (2 * f, mlp + d),
            ModelConfig::Gpt2(_) => (f + between, mlp + d),
        };
        let attention = (2 * (q + kv) + repeated + probabilities).saturating_sub(gone);
        // The gradient of what split tokens were gathered into, before it is scattered.
        let gathered = if between < d { d } else { 0 };
        let backward = within_mlp.max(attention) + gathered;
        let block = LayerActivations { kept, output: between, forward: d, backward, fixed: 0 };
        let embedding = LayerActivations { output: between, ..LayerActivations::default() };
        let shape = HeadShape {
            num_rows: num_samples * seq_len,
            width: d,
            num_classes: share(self.vocab_size()),
            element_bytes: compute_bytes,
        };
        let fixed = shape.needed(shape.rows_at_a_time(head_chunks)).0 as usize / compute_bytes.max(1);
        // Gradients are made within the forward pass: kept is that of the normalised input, beside which that input is needed.
        let head = LayerActivations { kept: d, forward: d, fixed, ..LayerActivations::default() };
        let blocks = std::iter::repeat_n(block, self.num_blocks());
        std::iter::once(embedding).chain(blocks).chain([head]).collect()
    }

    /// Whether every parameter can be cut over `degree` tensor-parallel ranks.
    ///
    /// # Errors
    /// [`SplitError`] of the first that cannot.
    pub fn check_tensor(&self, degree: usize) -> Result<(), SplitError> {
        self.layers().iter().flat_map(|layer| &layer.params).try_for_each(|param| param.check_split(degree))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn models() -> [ModelConfig; 2] {
        let llama = json!({"model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 192,
                           "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2,
                           "attention_bias": true});
        let gpt2 = json!({"model_type": "gpt2", "vocab_size": 1001, "n_embd": 64, "n_layer": 3, "n_head": 8});
        [llama, gpt2].map(|json| ModelConfig::from_json(&json).unwrap())
    }

    fn microbatch(num_samples: usize, head_chunk_rows: Option<usize>) -> Microbatch {
        let head_chunks = head_chunk_rows.map_or(HeadChunks::Host, HeadChunks::Rows);
        let grouped_queries = GroupedQueries::Shared;
        Microbatch { num_samples, seq_len: 256, compute_bytes: 2, head_chunks, grouped_queries }
    }

    #[test]
    fn a_rank_alone_shares_nothing() {
        for model in models() {
            let [off, on] = [SequenceParallel::Off, SequenceParallel::On]
                .map(|sequence| model.activations(1, sequence, microbatch(3, None)));
            assert_eq!(off, on);
        }
        let [_, gpt2] = models();
        // Three of the residual's width, q, k, v, the output; the MLP before and after; two matrices of dropped probabilities.
        let kept = 3 * 64 + 4 * 64 + 2 * 256 + 2 * 8 * 256;
        assert_eq!(gpt2.activations(1, SequenceParallel::Off, microbatch(1, None))[1].kept, kept);
    }

    #[test]
    fn the_head_holds_as_many_scores_as_it_is_told() {
        for model in models() {
            let head = |rows| {
                let layers = model.activations(1, SequenceParallel::Off, microbatch(3, rows));
                layers.last().unwrap().fixed
            };
            let vocab = model.vocab_size();
            assert_eq!(head(None), (3 * 256 + 64) * vocab);
            assert_eq!(head(Some(768)), head(None));
            // The sum in fp32 of the gradient, twice as wide as an element, beside scores of 100 rows.
            assert_eq!(head(Some(100)), (100 + 2 * 64) * vocab);
        }
    }

    #[test]
    fn ranks_share_what_is_cut() {
        let [llama, _] = models();
        let block = |degree, sequence| llama.activations(degree, sequence, microbatch(1, None))[1];
        let (one, four) = (block(1, SequenceParallel::Off), block(4, SequenceParallel::Off));
        // 2 key and value heads of width 8: each of 4 ranks has one.
        assert_eq!(one.kept, 3 * 64 + 2 * 64 + 2 * 16 + 3 * 192);
        assert_eq!(four.kept, 3 * 64 + 2 * 16 + 2 * 8 + 3 * 48);
        assert_eq!(block(4, SequenceParallel::On).kept, 2 * 64 + 16 + 2 * 16 + 2 * 8 + 3 * 48);
        assert_eq!(block(4, SequenceParallel::On).output, 16);
    }

    #[test]
    fn operations_are_two_for_each_element_of_a_matrix() {
        for model in models() {
            let flops = model.forward_flops(0);
            for (layer, flops) in model.layers().iter().zip(flops).skip(1) {
                let elements =
                    |param: &crate::ParamSpec| if param.shape.len() == 2 { param.numel() } else { 0 };
                assert_eq!(
                    flops,
                    2 * layer.params.iter().map(elements).sum::<usize>() as u64,
                    "{}",
                    layer.name
                );
            }
            assert!(model.forward_flops(10)[1] > model.forward_flops(0)[1]);
        }
    }

    #[test]
    fn shards_of_a_model_are_its_parameters() {
        for model in models() {
            for degree in [1, 2, 4, 8] {
                model.check_tensor(degree).unwrap();
                for layer in model.layers() {
                    let local = |rank| layer.local(degree, rank).unwrap();
                    for (i, param) in layer.params.iter().enumerate() {
                        let sum: usize = (0..degree).map(|rank| local(rank).params[i].numel()).sum();
                        let copies = param.split.map_or(degree, |split| split.num_sharers(degree));
                        assert_eq!(sum, copies * param.numel(), "{} {degree}", param.name);
                    }
                }
            }
        }
        let [llama, gpt2] = models();
        let error = llama.check_tensor(3).unwrap_err().to_string();
        assert!(error.starts_with("the `8` heads of `model.layers.0.self_attn.q_proj.weight`"), "{error}");
        assert!(error.ends_with("expected one of `1`, `2`, `4`"), "{error}");
        assert!(gpt2.check_tensor(16).is_err());
    }

    #[test]
    fn matrices_are_cut_and_vectors_beside_the_sum_are_not() {
        let [llama, gpt2] = models();
        let whole = |model: &ModelConfig| -> Vec<String> {
            let layers = model.layers();
            let params = layers[..2].iter().chain(layers.last()).flat_map(|layer| &layer.params);
            params.filter(|param| param.split.is_none()).map(|param| param.key.clone()).collect()
        };
        assert_eq!(
            whole(&llama),
            [
                "input_layernorm.weight",
                "self_attn.o_proj.bias",
                "post_attention_layernorm.weight",
                "norm.weight"
            ]
        );
        assert_eq!(
            whole(&gpt2),
            [
                "wpe.weight",
                "ln_1.weight",
                "ln_1.bias",
                "attn.c_proj.bias",
                "ln_2.weight",
                "ln_2.bias",
                "mlp.c_proj.bias",
                "ln_f.weight",
                "ln_f.bias"
            ]
        );
    }
}
