//! The graph of operators: what a dense decoder computes, before it is cut into tiles.
//!
//! Operators are listed in the order in which they depend on each other. Each takes all that the
//! one before it has made, so the list is the graph. Tensors are named here and nowhere else. Knows
//! configurations and families; does not know workers, tiles, events or the heap.

use tilert_mk_shared::blocks::FP8_BLOCK;
use tilert_mk_shared::task::{Epilogue, Prologue, TokenRows, WeightFormat};

use crate::config::ModelConfig;
use crate::families::TensorNames;

/// A tensor the program reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its shape, outermost first.
    pub shape: Vec<u64>,
    /// Of a matrix that is stored as FP8: the tensor of its scales, one for each block of 128 rows
    /// and 128 columns.
    pub scales: Option<TensorIdx>,
}

impl Tensor {
    /// Bytes of a matrix's row in the checkpoint, whose other matrices are `stored`.
    pub fn stored_row_bytes(&self, stored: WeightFormat) -> u64 {
        let format = if self.scales.is_some() { WeightFormat::Fp8 } else { stored };
        self.shape.last().map_or(0, |columns| columns * format.value_bytes())
    }

    /// The format in which tasks read a matrix; they read `others` if they are not stored as FP8.
    pub fn format(&self, others: WeightFormat) -> WeightFormat {
        if self.scales.is_some() { WeightFormat::Fp8 } else { others }
    }
}

/// Index of a tensor in `Graph::tensors`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorIdx(pub u32);

/// Rows of activations, one for each token of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// `[tokens, hidden_dim]`: the residual stream.
    Hidden,
    /// `[tokens, query_dim + 2 * kv_dim]`: queries, keys and values.
    Qkv,
    /// `[tokens, query_dim]`, still in splits: the result of attention.
    Splits,
    /// `[tokens, intermediate_dim]`.
    Intermediate,
    /// `[rows of logits, vocab_size]`.
    Logits,
}

/// A matrix of a linear operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// `[row_count, in_dim]`.
    pub weight: TensorIdx,
    /// `[row_count]`.
    pub bias: Option<TensorIdx>,
    /// Rows: values of an output row that it makes.
    pub row_count: u32,
    /// Column of the output where the first one goes.
    pub out_first: u32,
}

/// Matrices times activations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Linear {
    /// Input.
    pub x: Value,
    /// Output.
    pub y: Value,
    /// Values in an input row.
    pub in_dim: u32,
    /// Values in an output row.
    pub out_dim: u32,
    /// Computed before the product.
    pub prologue: Prologue,
    /// Weight of the norm, `[in_dim]`, with `Prologue::RmsNorm`.
    pub norm: Option<TensorIdx>,
    /// Computed after the product.
    pub epilogue: Epilogue,
    /// Tokens it is computed for.
    pub token_rows: TokenRows,
    /// Matrices: one to three; with `Epilogue::SiluMul` gate and up.
    pub matrices: Vec<Matrix>,
}

/// What an operator does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Looks tokens up: `Value::Hidden` from a table `[vocab_size, hidden_dim]`.
    Embed {
        /// The table.
        table: TensorIdx,
    },
    /// Matrices times activations.
    Linear(Linear),
    /// Appends keys and values to the cache and attends: `Value::Splits` from `Value::Qkv`.
    Attention {
        /// Layer in the cache.
        layer_idx: u32,
        /// Norm of each query head, `[head_dim]`.
        query_norm: Option<TensorIdx>,
        /// Norm of each key head, `[head_dim]`.
        key_norm: Option<TensorIdx>,
    },
}

/// One operator: one dependent stage of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operator {
    /// For people.
    pub name: String,
    /// What it does.
    pub kind: Kind,
}

/// A network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Graph {
    /// Every tensor, once.
    pub tensors: Vec<Tensor>,
    /// Operators in their order.
    pub operators: Vec<Operator>,
}

impl Graph {
    /// The graph of a dense decoder.
    pub fn new(config: &ModelConfig) -> Graph {
        let names = &config.architecture.family().names;
        let mut builder =
            Builder { config, names, graph: Graph { tensors: Vec::new(), operators: Vec::new() } };
        builder.decoder();
        builder.graph
    }
}

struct Builder<'a> {
    config: &'a ModelConfig,
    names: &'a TensorNames,
    graph: Graph,
}

impl Builder<'_> {
    fn tensor(&mut self, name: String, shape: &[u32]) -> TensorIdx {
        let shape = shape.iter().map(|axis| u64::from(*axis)).collect();
        self.graph.tensors.push(Tensor { name, shape, scales: None });
        TensorIdx(self.graph.tensors.len() as u32 - 1)
    }

    fn operator(&mut self, name: String, kind: Kind) {
        self.graph.operators.push(Operator { name, kind });
    }

    fn norm(&mut self, name: &str, dim: u32) -> TensorIdx {
        self.tensor(format!("{name}.weight"), &[dim])
    }

    /// A matrix whose first product goes to column `out_first`.
    fn matrix(&mut self, name: &str, shape: [u32; 2], has_bias: bool, out_first: u32) -> Matrix {
        let weight = self.tensor(format!("{name}.weight"), &shape);
        let bias = has_bias.then(|| self.tensor(format!("{name}.bias"), &shape[..1]));
        if self.config.fp8.as_ref().is_some_and(|fp8| fp8.contains(name)) {
            let blocks = shape.map(|axis| axis.div_ceil(FP8_BLOCK as u32));
            let scales = self.tensor(format!("{name}.weight_scale_inv"), &blocks);
            self.graph.tensors[weight.0 as usize].scales = Some(scales);
        }
        Matrix { weight, bias, row_count: shape[0], out_first }
    }

    fn decoder(&mut self) {
        let (hidden, vocab) = (self.config.hidden_dim, self.config.vocab_size);
        let table = self.tensor(format!("{}.weight", self.names.embedding), &[vocab, hidden]);
        self.operator("embed".into(), Kind::Embed { table });
        for layer_idx in 0..self.config.layer_count {
            self.attention(layer_idx);
            self.feed_forward(layer_idx);
        }
        let head = if self.config.tied_head {
            Matrix { weight: table, bias: None, row_count: vocab, out_first: 0 }
        } else {
            self.matrix(self.names.head, [vocab, hidden], false, 0)
        };
        let norm = self.norm(self.names.final_norm, hidden);
        let linear = Linear {
            x: Value::Hidden,
            y: Value::Logits,
            in_dim: hidden,
            out_dim: vocab,
            prologue: Prologue::RmsNorm,
            norm: Some(norm),
            epilogue: Epilogue::StoreBest,
            token_rows: TokenRows::Logits,
            matrices: vec![head],
        };
        self.operator("head".into(), Kind::Linear(linear));
    }

    /// Norm and projections, attention, output projection and residual of one layer.
    fn attention(&mut self, layer_idx: u32) {
        let (c, names) = (self.config, self.names);
        let (hidden, query, kv) = (c.hidden_dim, c.query_dim(), c.kv_dim());
        let at = |part: &str| names.in_layer(layer_idx, part);
        let norm = self.norm(&at(names.input_norm), hidden);
        let parts =
            [(names.query, query, 0), (names.key, kv, query), (names.value, kv, query + kv)];
        let matrices = parts.map(|(part, rows, out_first)| {
            self.matrix(&at(part), [rows, hidden], c.qkv_bias, out_first)
        });
        let linear = Linear {
            x: Value::Hidden,
            y: Value::Qkv,
            in_dim: hidden,
            out_dim: query + 2 * kv,
            prologue: Prologue::RmsNorm,
            norm: Some(norm),
            epilogue: Epilogue::Store,
            token_rows: TokenRows::All,
            matrices: matrices.into(),
        };
        self.operator(format!("layer {layer_idx} qkv"), Kind::Linear(linear));

        let [query_norm, key_norm] = [names.query_norm, names.key_norm]
            .map(|part| c.qk_norm.then(|| self.norm(&at(part), c.head_dim)));
        let kind = Kind::Attention { layer_idx, query_norm, key_norm };
        self.operator(format!("layer {layer_idx} attention"), kind);

        let matrix = self.matrix(&at(names.output), [hidden, query], c.output_bias, 0);
        let linear = residual(Value::Splits, Prologue::MergeSplits, [hidden, query], matrix);
        self.operator(format!("layer {layer_idx} output"), Kind::Linear(linear));
    }

    /// Norm, gate and up, down and residual of one layer.
    fn feed_forward(&mut self, layer_idx: u32) {
        let (c, names) = (self.config, self.names);
        let (hidden, inner) = (c.hidden_dim, c.intermediate_dim);
        let at = |part: &str| names.in_layer(layer_idx, part);
        let norm = self.norm(&at(names.post_norm), hidden);
        let matrices = [names.gate, names.up]
            .map(|part| self.matrix(&at(part), [inner, hidden], c.mlp_bias, 0));
        let linear = Linear {
            x: Value::Hidden,
            y: Value::Intermediate,
            in_dim: hidden,
            out_dim: inner,
            prologue: Prologue::RmsNorm,
            norm: Some(norm),
            epilogue: Epilogue::SiluMul,
            token_rows: TokenRows::All,
            matrices: matrices.into(),
        };
        self.operator(format!("layer {layer_idx} gate-up"), Kind::Linear(linear));

        let matrix = self.matrix(&at(names.down), [hidden, inner], c.mlp_bias, 0);
        let linear = residual(Value::Intermediate, Prologue::None, [hidden, inner], matrix);
        self.operator(format!("layer {layer_idx} down"), Kind::Linear(linear));
    }
}

/// A matrix `[rows, columns]` whose products are added to the residual stream.
fn residual(x: Value, prologue: Prologue, shape: [u32; 2], matrix: Matrix) -> Linear {
    Linear {
        x,
        y: Value::Hidden,
        in_dim: shape[1],
        out_dim: shape[0],
        prologue,
        norm: None,
        epilogue: Epilogue::AddResidual,
        token_rows: TokenRows::All,
        matrices: vec![matrix],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graph(family: &str, changes: &str) -> Graph {
        let json = format!(
            r#"{{"model_type": "{family}", "hidden_size": 64, "intermediate_size": 160,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 8, "vocab_size": 100, "max_position_embeddings": 128 {changes}}}"#
        );
        Graph::new(&ModelConfig::parse(&json).unwrap())
    }

    fn names(graph: &Graph) -> Vec<&str> {
        graph.tensors.iter().map(|tensor| tensor.name.as_str()).collect()
    }

    #[test]
    fn llama_has_nine_tensors_a_layer() {
        let graph = graph("llama", "");
        assert_eq!(graph.operators.len(), 2 + 5 * 2);
        assert_eq!(
            names(&graph)[..10],
            [
                "model.embed_tokens.weight",
                "model.layers.0.input_layernorm.weight",
                "model.layers.0.self_attn.q_proj.weight",
                "model.layers.0.self_attn.k_proj.weight",
                "model.layers.0.self_attn.v_proj.weight",
                "model.layers.0.self_attn.o_proj.weight",
                "model.layers.0.post_attention_layernorm.weight",
                "model.layers.0.mlp.gate_proj.weight",
                "model.layers.0.mlp.up_proj.weight",
                "model.layers.0.mlp.down_proj.weight",
            ]
        );
        assert_eq!(names(&graph)[19..], ["lm_head.weight", "model.norm.weight"]);
        assert_eq!(graph.tensors[3].shape, [16, 64]);
        assert_eq!(graph.tensors[5].shape, [64, 32]);
    }

    #[test]
    fn families_differ_in_biases_norms_and_heads() {
        let ends_in = |graph: &Graph, end: &str| {
            names(graph).iter().filter(|name| name.ends_with(end)).count()
        };
        let qwen2 = graph("qwen2", r#", "tie_word_embeddings": true"#);
        assert_eq!(ends_in(&qwen2, "_proj.bias"), 2 * 3);
        assert_eq!(ends_in(&qwen2, "lm_head.weight"), 0);
        let qwen3 = graph("qwen3", "");
        assert_eq!(ends_in(&qwen3, ".bias"), 0);
        assert_eq!(ends_in(&qwen3, "self_attn.q_norm.weight"), 2);
        let biased = graph("llama", r#", "attention_bias": true, "mlp_bias": true"#);
        assert_eq!(ends_in(&biased, "_proj.bias"), 2 * 7);
        assert_eq!(graph("mistral", ""), graph("llama", ""));
    }

    #[test]
    fn fp8_matrices_have_scales() {
        let graph = graph(
            "llama",
            r#", "attention_bias": true, "quantization_config": {"quant_method": "fp8",
            "weight_block_size": [128, 128], "modules_to_not_convert": ["model.layers.1"]}"#,
        );
        let scaled: Vec<_> =
            graph.tensors.iter().filter(|tensor| tensor.scales.is_some()).collect();
        assert_eq!(scaled.len(), 7);
        for matrix in &scaled {
            let scales = &graph.tensors[matrix.scales.unwrap().0 as usize];
            assert_eq!(scales.name, matrix.name.clone() + "_scale_inv");
            let is_down = matrix.name.ends_with("down_proj.weight");
            assert_eq!(
                scales.shape,
                if is_down { [1, 2] } else { [matrix.shape[0].div_ceil(128), 1] }
            );
        }
        let down = scaled.last().unwrap();
        assert_eq!(down.stored_row_bytes(WeightFormat::Bf16), 160);
        assert_eq!(graph.tensors[0].stored_row_bytes(WeightFormat::Bf16), 128);
    }
}
