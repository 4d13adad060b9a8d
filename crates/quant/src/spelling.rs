//! What somebody may have meant who wrote a word that there is not.

/// The known word that is nearest to `word`, if it is near: at most a third of its characters differ (Damerau-Levenshtein,
/// case left aside).
///
/// ```
/// use mlx_quant::spelling::nearest;
/// assert_eq!(nearest("gtpq", ["awq", "gptq"]), Some("gptq"));
/// assert_eq!(nearest("Qwen3-8b", ["Qwen3-8B", "Qwen3-4B"]), Some("Qwen3-8B"));
/// assert_eq!(nearest("llama", ["awq", "gptq"]), None);
/// ```
pub fn nearest<'k>(word: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    let lower = word.to_lowercase();
    let far = |name: &str| strsim::damerau_levenshtein(&lower, &name.to_lowercase());
    let near = known.into_iter().map(|name| (far(name), name)).min_by_key(|(distance, _)| *distance);
    near.filter(|(distance, name)| distance * 3 <= name.chars().count().max(lower.chars().count()))
        .map(|near| near.1)
}

/// `did you mean X? `, to begin a hint with; empty if nothing is near.
pub fn did_you_mean<'k>(word: &str, known: impl IntoIterator<Item = &'k str>) -> String {
    nearest(word, known).map_or_else(String::new, |name| format!("did you mean {name}? "))
}
