# A template: update.sh fills in the version and the checksums (@...@) of a release.
class MlxQuant < Formula
  desc "Turns Hugging Face language models into MLX quantized models"
  homepage "https://github.com/mlx-quant/mlx-quant"
  version "@version@"
  license any_of: ["MIT", "Apache-2.0"]

  on_macos do
    on_arm do
      url "https://github.com/mlx-quant/mlx-quant/releases/download/v@version@/mlx-quant-@version@-aarch64-apple-darwin.tar.gz"
      sha256 "@aarch64-apple-darwin@"
    end
    on_intel do
      url "https://github.com/mlx-quant/mlx-quant/releases/download/v@version@/mlx-quant-@version@-x86_64-apple-darwin.tar.gz"
      sha256 "@x86_64-apple-darwin@"
    end
  end

  on_linux do
    on_arm do
      url "https://github.com/mlx-quant/mlx-quant/releases/download/v@version@/mlx-quant-@version@-aarch64-unknown-linux-gnu.tar.gz"
      sha256 "@aarch64-unknown-linux-gnu@"
    end
    on_intel do
      url "https://github.com/mlx-quant/mlx-quant/releases/download/v@version@/mlx-quant-@version@-x86_64-unknown-linux-gnu.tar.gz"
      sha256 "@x86_64-unknown-linux-gnu@"
    end
  end

  def install
    bin.install "mlx-quant"
    man1.install Dir["share/man/man1/*.1"]
    bash_completion.install "share/bash-completion/completions/mlx-quant"
    zsh_completion.install "share/zsh/site-functions/_mlx-quant"
    fish_completion.install "share/fish/vendor_completions.d/mlx-quant.fish"
    doc.install "SOURCES.md"
  end

  test do
    assert_match version.to_s, shell_output("#{bin}/mlx-quant --version")
    system bin/"mlx-quant", "convert", "-q", "--mlx-path", testpath/"demo"
    assert_path_exists testpath/"demo/model.safetensors"
  end
end
