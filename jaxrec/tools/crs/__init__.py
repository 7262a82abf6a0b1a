"""Conversational recommenders: who a simulated user talks to (arXiv 2504.20458).

All are a :class:`jaxrec.tools.conversation.Recommender`: ``prompted.PromptedRecommender`` (a language model writes
titles), ``retrieval.RetrievalRecommender`` (a query is answered by BM25 or an encoder), ``query.QueryRecommender`` (a
model of ours writes the query, as it learns to in ``rl.envs.user``), ``sequential.SequentialRecommender`` (a trained
one goes by the items of the dialogue). ``environment`` puts the parts into the environment of reinforcement learning.
"""
