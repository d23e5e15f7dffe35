# examples: programs that use the public interface only.
