//! The host side of tilert-mk: loads weights, feeds tokens, and reports.

mod bandwidth;
pub mod chat_template;
pub mod cli;
pub mod driver;
pub mod engine;
pub mod error;
pub mod load;
pub mod logits_file;
pub mod metrics;
pub mod tokenizer;
pub mod trace_file;
